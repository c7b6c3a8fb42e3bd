"""Models that speak as well: what is changed is the part of them that sees and thinks, a vision-language model.

Qwen-Omni's models hold it as ``thinker``. They have no ``forward`` of their own, only a ``generate`` that has the
thinker generate text, and others make sound of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from .method_guard import MethodGuard, arguments_by_name

THINKER = "thinker"
#: Arguments of ``generate`` that are the thinker's alone.
_ARGUMENTS = ("instruction", "instruction_mask")


def is_omni(model: nn.Module) -> bool:
    return THINKER in model._modules and type(model).forward is nn.Module.forward


def guard_wrappers(around: Sequence[nn.Module]) -> None:
    """Guard the models that speak among the wrappers around a thinker that was changed."""
    for model in filter(is_omni, around):
        for name, guard in (("generate", _generate), ("save_pretrained", _save_pretrained)):
            MethodGuard.install_once(model, name, guard, THINKER)


def release_wrappers(around: Sequence[nn.Module]) -> None:
    """Take the guards off the models around a thinker, unless something that saves itself is still on it."""
    for model in filter(is_omni, around):
        if not isinstance(vars(model.get_submodule(THINKER)).get("save_pretrained"), MethodGuard):
            MethodGuard.remove_all(model, THINKER)


def _generate(model: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Generate with an instruction, which without a prefix would be an argument of the talker, too."""
    thinker_arguments = {f"{THINKER}_{name}": kwargs.pop(name) for name in _ARGUMENTS if name in kwargs}
    return original(*args, **kwargs, **thinker_arguments)


def _save_pretrained(model: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Save as the thinker's guards do, with the whole model in the thinker's place."""
    thinker = model.get_submodule(THINKER)
    guard = thinker.__dict__.get("save_pretrained")
    if not isinstance(guard, MethodGuard):
        return original(*args, **kwargs)
    arguments = arguments_by_name(original, args, kwargs)
    prefix = f"{THINKER}."
    if (given := arguments.pop("state_dict", None)) is None:
        given = model.state_dict()
    else:
        arguments["state_dict"] = {
            name.removeprefix(prefix): value for name, value in given.items() if name.startswith(prefix)
        }
    others = {name: value for name, value in given.items() if not name.startswith(prefix)}

    @functools.wraps(original)
    def save_whole(**options: Any) -> Any:
        of_thinker: dict[str, Tensor] | None = options.pop("state_dict", None)
        of_thinker = thinker.state_dict() if of_thinker is None else of_thinker
        tensors = others | {prefix + name: value for name, value in of_thinker.items()}
        return original(**options, state_dict=tensors)

    return guard.before(save_whole)(**arguments)
