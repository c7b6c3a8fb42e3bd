"""What ``model.save_pretrained`` and Trainer's checkpoints of a model that draws hold.

- ``model.save_pretrained(folder)`` writes the model without the branch, so that it reloads as the model it was, and the
  branch's own files beside it.
- Trainer calls ``model.save_pretrained(folder, state_dict=…)`` and resumes from the ``model.safetensors`` it finds: the
  branch's tensors alone, if nothing else is trained, and else the whole model's; and the branch's own files.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from ..atomic import replace_files
from ..guards import MethodGuard, arguments_by_name
from . import checkpoint
from .state import MODULE_NAME, STATE_ATTRIBUTE

_PREFIX = f"{MODULE_NAME}."
_TRAINER_WEIGHTS = "model.safetensors"


def install(model: nn.Module) -> None:
    MethodGuard.install(model, "save_pretrained", guard_save_pretrained, STATE_ATTRIBUTE)


def remove(model: nn.Module) -> None:
    """Undo :func:`install`."""
    for guard in [value for value in vars(model).values() if isinstance(value, MethodGuard)]:
        if guard.switch == STATE_ATTRIBUTE:
            guard.remove(model)


def guard_save_pretrained(model: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    kwargs = arguments_by_name(original, args, kwargs)
    if "save_directory" not in kwargs:
        return original(**kwargs)
    folder, is_main_process = Path(kwargs["save_directory"]), kwargs.get("is_main_process", True)
    # Trainer's calls name it, if only to say None.
    by_trainer = "state_dict" in kwargs
    gathered = kwargs.get("state_dict")
    gathered = model.state_dict() if by_trainer and gathered is None else gathered
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    result = None
    if gathered is None or not any(name.startswith(_PREFIX) for name in gathered):
        # Not Trainer's.
        with _left_out(model):
            result = original(**kwargs)
    elif all(name.startswith(_PREFIX) for name in trained):
        own = {name: value.detach().cpu().contiguous() for name, value in gathered.items() if name.startswith(_PREFIX)}
        # A model's own weights stay where a model is.
        if is_main_process and not (folder / "config.json").exists():
            replace_files(folder, {_TRAINER_WEIGHTS: lambda path: save_file(own, path, {"format": "pt"})})
    else:
        result = original(**kwargs)
    checkpoint.save(model, folder, is_main_process=is_main_process)
    return result


@contextmanager
def _left_out(model: nn.Module) -> Iterator[None]:
    """In the block, and in this thread, the model's ``state_dict`` lacks the branch."""
    thread = threading.get_ident()

    def leave_out(_: nn.Module, state_dict: dict[str, Tensor], prefix: str, __: Any) -> None:
        if threading.get_ident() == thread:
            for name in [name for name in state_dict if name.startswith(prefix + _PREFIX)]:
                del state_dict[name]

    handle = model.register_state_dict_post_hook(leave_out)
    try:
        yield
    finally:
        handle.remove()
