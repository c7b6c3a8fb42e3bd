"""Writing adapter folders, by one of the processes that train."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safetensors.torch import save as serialize
from torch import Tensor, nn

from ..files import description
from ..files.atomic import replace_files
from ..files.tensor_folder import check_finite
from ..modules import sharding
from ..patching.state import state_of
from ..patching.trainable_parameters import count_parameters
from .format import (
    ALIGNMENT_PREFIX,
    CARD_NAME,
    CONFIG_NAME,
    FORMAT,
    PROJECTOR_PREFIX,
    SUBFOLDER,
    WEIGHTS_NAME,
)
from .model_card import GENERATED_MARKER, model_card
from .reading import holds_model, is_adapter


def save(
    model: nn.Module,
    directory: str | PathLike[str],
    adapter: str | None = None,
    *,
    location: str = "path/to/this/folder",
    is_main_process: bool | None = None,
    gathered: Mapping[str, Tensor] | None = None,
    further: Mapping[str, Mapping[str, Tensor]] = MappingProxyType({}),
) -> None:
    """Write an adapter of a patched model, on rank 0 or where ``is_main_process`` says so.

    Sharded weights are gathered by all processes, which then wait for the one that writes, unless ``gathered``, a
    state dict of the model, holds them.

    Args:
        model: a patched model.
        directory: the folder. Where it holds a model, the adapter goes beside that, into ``emma_adapter/``.
        adapter: its name; default: the active one.
        location: what the model card says to load.
        is_main_process: whether this process writes.
        gathered: see above.
        further: tensor files to write beside the adapter, by name; their tensors are whole, not sharded.

    Raises:
        OSError: if the folder can't be written, or holds another tool's adapter; its former adapter is intact.
        CheckpointError: if the weights aren't finite.
    """
    adapter = state_of(model).active if adapter is None else adapter
    adapter_tensors = _own_tensors(model, adapter)
    gathers = gathered is None and any(sharding.is_sharded(value) for value in adapter_tensors.values())
    tensors = sharding.gather(model, adapter_tensors, gathered)
    try:
        if sharding.is_main_process() if is_main_process is None else is_main_process:
            _write(model, Path(directory), adapter, tensors, location, further)
    finally:
        if gathers:
            sharding.wait_for_everyone()


def _write(
    model: nn.Module,
    directory: Path,
    adapter: str,
    tensors: Mapping[str, Tensor],
    location: str,
    further: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """Write an adapter folder, the tensor file first: once it is there, the new adapter is complete."""
    check_not_foreign(directory)
    requested_directory = directory
    if holds_model(requested_directory):
        directory = requested_directory / SUBFOLDER
        check_not_foreign(directory)
    # Values and checksum must be of one moment, whatever another thread does to the model meanwhile.
    tensors = {name: value.clone() for name, value in tensors.items()}
    check_finite(tensors, directory)
    described = description.describe(FORMAT, model.config, tensors, _entries(model, adapter))
    metadata, config = description.encoded(FORMAT, described)
    files = {WEIGHTS_NAME: serialize(tensors, metadata), CONFIG_NAME: config}
    for name, further_tensors in further.items():
        files[name] = serialize(dict(further_tensors), {"format": "pt"})
    if _may_write_card(directory / CARD_NAME):
        files[CARD_NAME] = model_card(described, count_parameters(model, adapter), location).encode()
    replace_files(directory, files)
    if directory is not requested_directory:
        # An earlier release put the adapter among the model's files.
        discard(requested_directory)


def save_tensors(directory: Path, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Write one tensor file, atomically."""
    replace_files(directory, {name: serialize(dict(tensors), {"format": "pt"})})


def save_all(model: nn.Module, directory: Path, **more: Any) -> None:
    """Write every adapter of a patched model: the active one into the folder, the others into subfolders of their name.

    ``more`` is passed to :func:`save`.
    """
    active = state_of(model).active
    for adapter in state_of(model).adapters:
        save(model, directory if adapter == active else directory / adapter, adapter, **more)


def discard(directory: Path) -> None:
    """Remove an adapter of this library from a folder; other files stay."""
    if is_adapter(directory):
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            (directory / name).unlink(missing_ok=True)


def _entries(model: nn.Module, adapter: str) -> dict[str, Any]:
    """Return what the description of an adapter says beside what every folder's says."""
    attached = state_of(model).adapters[adapter]
    return {
        "reads_turns": attached.pipeline.reader.markers is not None,
        "projector_trained": bool(attached.own_projectors()),
        # Which kernel computes the adapter depends on the machine it runs on.
        "config": attached.config.replace(kernel="auto").to_dict(),
    }


def _own_tensors(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """Return an adapter's tensors, and those of its own projectors, by name in the file."""
    attached = state_of(model).adapters[adapter]
    tensors = {ALIGNMENT_PREFIX + name: value for name, value in attached.state_dict(keep_vars=True).items()}
    projector: dict[str, Tensor] = dict(attached.projector_parameters())
    return tensors | {PROJECTOR_PREFIX + name: value for name, value in projector.items()}


def check_not_foreign(directory: Path, called: str | None = None) -> None:
    """Check that a folder holds no adapter of another tool, whose files would be replaced.

    Args:
        directory: the folder.
        called: its name in the message, if it is a copy of something else.

    Raises:
        FileExistsError: if it does.
    """
    try:
        described = json.loads((directory / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # not there, or no tool's config
        return
    if isinstance(described, dict) and described.get("format") != FORMAT.name:
        owner = "PEFT" if "peft_type" in described else "another tool"
        message = f"this is an adapter of {owner}, which would be lost; save to another folder"
        raise FileExistsError(errno.EEXIST, message, called or str(directory))


def _may_write_card(path: Path) -> bool:
    """Return whether there is no card yet, or a generated one: what somebody else put in its place stays."""
    if not os.path.lexists(path):
        return True
    try:
        return path.is_file() and GENERATED_MARKER in path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
