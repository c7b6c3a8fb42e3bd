"""Taking vision experts off a model again."""

from __future__ import annotations

from torch import nn

from ..modules import private
from . import base_saves, hooks
from .state import MODULE_NAME, STATE_ATTRIBUTE, experts_state
from .training import unfreeze


def is_on(model: nn.Module) -> bool:
    """Return whether a model has vision experts."""
    return STATE_ATTRIBUTE in model.__dict__


def take_one_off(model: nn.Module, name: str) -> None:
    """Take one of several experts off a model."""
    state = experts_state(model)
    if state.trained == name:
        unfreeze(model)
    state.config = state.config.replace(experts=tuple(expert for expert in state.config.experts if expert != name))
    state.module.remove(name)


def take_off(model: nn.Module) -> None:
    """Take all experts off, leaving the model as it was before."""
    state = experts_state(model)
    unfreeze(model)
    base_saves.remove(model)
    for module in [module for module in model.modules() if module.__dict__.get(STATE_ATTRIBUTE) is state]:
        hooks.remove(module)
        del module.__dict__[STATE_ATTRIBUTE]
    private.stop_answering_trainer(model, MODULE_NAME)
    delattr(model, MODULE_NAME)
    private.forget_compiled_code()
