"""Taking a generation branch off a model again."""

from __future__ import annotations

from torch import nn

from ..modules import private
from . import base_saves, calls, fusion, generation_mode
from .state import MODULE_NAME, STATE_ATTRIBUTE, unified_state
from .training import unfreeze


def is_on(model: nn.Module) -> bool:
    """Return whether a model was made to draw."""
    return STATE_ATTRIBUTE in model.__dict__


def take_off(model: nn.Module) -> None:
    """Take all generation branches off, leaving the model as it was before."""
    state = unified_state(model)
    unfreeze(model)
    for module in [module for module in model.modules() if module.__dict__.get(STATE_ATTRIBUTE) is state]:
        fusion.remove(module)
        calls.remove(module)
        del module.__dict__[STATE_ATTRIBUTE]
    base_saves.remove(model)
    generation_mode.remove(model, state)
    private.stop_answering_trainer(model, MODULE_NAME)
    delattr(model, MODULE_NAME)
    private.forget_compiled_code()
