"""The wrappers around a model, of other tools or a larger model that also speaks, and the model inside."""

from __future__ import annotations

from typing import Any

from torch import nn

from . import private
from .omni import THINKER, is_omni


def around(model: nn.Module) -> list[nn.Module]:
    """Return the wrappers around a transformers model, a ``PeftModel`` among them, from the outside."""
    wrappers = []
    while (inside := _inside(model)) is not None:
        wrappers.append(model)
        model = inside
    return wrappers


def base_of(model: nn.Module) -> nn.Module:
    """Return the transformers model inside its wrappers; any other model itself."""
    while (inside := _inside(model)) is not None:
        model = inside
    return model


def is_peft_model(model: nn.Module) -> bool:
    # On the class: a wrapper may look attributes up on what it holds.
    return callable(getattr(type(model), "get_base_model", None))


def knows_its_parameters(wrapper: nn.Module) -> bool:
    """Return whether a wrapper has noted the parameters of the model that it was made for, or copied them."""
    follows = isinstance(wrapper, nn.DataParallel) or private.COMPILED in wrapper._modules
    return not follows and not is_peft_model(wrapper) and not is_omni(wrapper)


def _inside(model: Any) -> nn.Module | None:
    if is_peft_model(model):
        base: nn.Module = model.get_base_model()
        return base
    if is_omni(model):
        thinker: nn.Module = model.get_submodule(THINKER)
        return thinker
    return next((held for name in private.HELD_AS if (held := model._modules.get(name)) is not None), None)
