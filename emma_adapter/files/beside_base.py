"""Saves of a model to which this library has added a part, by ``model.save_pretrained`` and Trainer.

- ``model.save_pretrained(folder)`` writes the model without the part, so that it reloads as the model it was, and the
  part's own files beside it.
- A call that comes from a Trainer writes the ``model.safetensors`` that it resumes from: the part's tensors alone if
  nothing else is trained, else the whole model's; the part's own files go beside it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from .atomic import replace_files

_TRAINER_WEIGHTS = "model.safetensors"


def save_pretrained(
    model: nn.Module,
    original: Callable[..., Any],
    arguments: dict[str, Any],
    *,
    prefix: str,
    save: Callable[..., None],
    by_trainer: bool,
) -> Any:
    """Save a model that has a part, as ``model.save_pretrained`` or Trainer asks.

    Args:
        model: the model with the part.
        original: its unguarded ``save_pretrained``.
        arguments: of the call, by name.
        prefix: of the part's names in the model's ``state_dict``.
        save: writes the part's own files; called as ``save(model, folder, is_main_process=…)``.
        by_trainer: whether a Trainer that runs in this thread makes the call.
    """
    if "save_directory" not in arguments:
        # The original raises the error about the missing argument.
        return original(**arguments)
    folder, is_main_process = Path(arguments["save_directory"]), arguments.get("is_main_process", True)
    gathered: dict[str, Tensor] | None = arguments.get("state_dict")
    if by_trainer and gathered is None:
        gathered = model.state_dict()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    result = None
    if gathered is None or not by_trainer or not any(name.startswith(prefix) for name in gathered):
        if gathered is not None:
            gathered = {name: value for name, value in gathered.items() if not name.startswith(prefix)}
        with _left_out(model, prefix):
            result = original(**{**arguments, "state_dict": gathered})
    elif all(name.startswith(prefix) for name in trained):
        part_tensors = {
            name: value.detach().cpu().contiguous() for name, value in gathered.items() if name.startswith(prefix)
        }
        # If a model was saved there, its weights stay.
        if is_main_process and not (folder / "config.json").exists():
            replace_files(folder, {_TRAINER_WEIGHTS: lambda path: save_file(part_tensors, path, {"format": "pt"})})
    else:
        result = original(**arguments)
    save(model, folder, is_main_process=is_main_process)
    return result


@contextmanager
def _left_out(model: nn.Module, prefix: str) -> Iterator[None]:
    """Leave the part out of the model's ``state_dict``, in the block and in this thread."""
    thread = threading.get_ident()

    def leave_out(_: nn.Module, state_dict: dict[str, Tensor], before: str, __: Any) -> None:
        if threading.get_ident() == thread:
            for name in [name for name in state_dict if name.startswith(before + prefix)]:
                del state_dict[name]

    handle = model.register_state_dict_post_hook(leave_out)
    try:
        yield
    finally:
        handle.remove()
