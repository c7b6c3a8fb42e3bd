"""Saves of a model that draws, by ``model.save_pretrained`` and Trainer; see ``files/beside_base.py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..files import beside_base
from ..modules import private
from ..modules.method_guard import MethodGuard, arguments_by_name
from . import checkpoint
from .state import MODULE_NAME, STATE_ATTRIBUTE


def install(model: nn.Module) -> None:
    MethodGuard.install(model, "save_pretrained", guard_save_pretrained, STATE_ATTRIBUTE)


def remove(model: nn.Module) -> None:
    """Undo :func:`install`."""
    MethodGuard.remove_all(model, STATE_ATTRIBUTE)


def guard_save_pretrained(model: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    arguments = arguments_by_name(original, args, kwargs)
    return beside_base.save_pretrained(
        model,
        original,
        arguments,
        prefix=f"{MODULE_NAME}.",
        save=checkpoint.save_all,
        by_trainer=private.running_trainer() is not None,
    )
