"""Writing an adapter folder: whole or not at all, by one process."""

from __future__ import annotations

import json
import os
import platform
import shutil
import tempfile
import time
import uuid
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from . import attachment, sharding
from .checkpoint import (
    ALIGNMENT_PREFIX,
    CARD_NAME,
    CONFIG_NAME,
    FORMAT,
    FORMAT_VERSION,
    PROJECTOR_PREFIX,
    WEIGHTS_NAME,
    digest,
)
from .model_card import GENERATED_MARKER, model_card
from .state import state_of
from .training import count_parameters, trained_projector_parameters
from .version import __version__

_SCRATCH_PREFIX = ".emma-save-"
_ABANDONED_AFTER = 24 * 3600  # seconds


def save(
    model: nn.Module,
    directory: str | PathLike[str],
    adapter: str | None = None,
    *,
    location: str = "path/to/this/folder",
    is_main_process: bool | None = None,
    gathered: Mapping[str, Tensor] | None = None,
) -> None:
    """Write an adapter of a patched model, on rank 0 or where ``is_main_process`` says so.

    Sharded weights are gathered by all processes, which then wait for the one that writes, unless ``gathered``, a
    state dict of the model, holds them.

    Args:
        model: patched.
        directory: the folder.
        adapter: its name; default: the active one.
        location: what the model card says to load.
        is_main_process: whether this process writes.
        gathered: see above.
    """
    adapter = state_of(model).active if adapter is None else adapter
    own = _own_tensors(model, adapter)
    together = gathered is None and any(sharding.is_sharded(value) for value in own.values())
    tensors = sharding.gather(model, own, gathered)
    try:
        if sharding.is_main_process() if is_main_process is None else is_main_process:
            _write(model, Path(directory), adapter, tensors, location)
    finally:
        if together:
            sharding.wait_for_everyone()


def _write(model: nn.Module, directory: Path, adapter: str, tensors: Mapping[str, Tensor], location: str) -> None:
    """Write an adapter folder.

    The new files are complete on disk before the first replaces its predecessor: whenever this is killed, the
    folder holds the previous adapter or the new one.
    """
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"{directory} is a file; save_pretrained needs the name of a folder")
    directory.mkdir(parents=True, exist_ok=True)
    description = _describe(model, adapter, tensors)
    text = json.dumps(description, indent=2, sort_keys=True) + "\n"
    metadata = {"format": "pt", FORMAT: json.dumps(description, sort_keys=True)}

    _remove_leftovers(directory)
    scratch = Path(tempfile.mkdtemp(prefix=f"{_SCRATCH_PREFIX}{platform.node()}-{os.getpid()}-", dir=directory))
    try:
        save_file(dict(tensors), scratch / WEIGHTS_NAME, metadata=metadata)
        (scratch / CONFIG_NAME).write_text(text, encoding="utf-8")
        names = [WEIGHTS_NAME, CONFIG_NAME]
        if _may_write_card(directory / CARD_NAME):
            card = model_card(description, count_parameters(model, adapter), location)
            (scratch / CARD_NAME).write_text(card, encoding="utf-8")
            names.append(CARD_NAME)
        for name in names:
            # As readable as any file of this user; safetensors creates private ones.
            os.chmod(scratch / name, 0o666 & ~_umask())
            _flush(scratch / name)
        for name in names:
            os.replace(scratch / name, directory / name)
        _flush(directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def save_all(model: nn.Module, directory: Path, **more: Any) -> None:
    """Write every adapter of a patched model: the active one into the folder, the others into folders of their name.
    ``more`` is for :func:`save`."""
    active = state_of(model).active
    for adapter in state_of(model).adapters:
        save(model, directory if adapter == active else directory / adapter, adapter, **more)


def _describe(model: nn.Module, adapter: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    named = state_of(model).adapters[adapter]
    base: Any = model.config
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "library_version": __version__,
        "save_id": uuid.uuid4().hex,
        "sha256": digest(tensors),
        "base_model_name_or_path": getattr(base, "_name_or_path", "") or None,
        "model_type": base.model_type,
        "reads_turns": named.pipeline.reader.markers is not None,
        "projector_trained": bool(named.original_projectors),
        # What computes the adapter is the business of the machine it runs on.
        "config": named.config.replace(kernel="auto").to_dict(),
    }


def _own_tensors(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """An adapter's tensors by their names in the file, and the projectors' if they are trained with it."""
    own = attachment.state_dict(model, adapter, keep_vars=True)
    tensors = {ALIGNMENT_PREFIX + name: value for name, value in own.items()}
    projector = trained_projector_parameters(model, adapter)
    return tensors | {PROJECTOR_PREFIX + name: value for name, value in projector.items()}


def _remove_leftovers(directory: Path) -> None:
    """Remove what killed saves left; the scratch folder of a save that still runs, here or elsewhere, stays."""
    for leftover in directory.glob(f"{_SCRATCH_PREFIX}*"):
        host, _, process = leftover.name.removeprefix(_SCRATCH_PREFIX).rpartition("-")[0].rpartition("-")
        if host == platform.node() and process.isdigit() and _is_running(int(process)):
            continue
        if host == platform.node() or time.time() - leftover.stat().st_mtime > _ABANDONED_AFTER:
            shutil.rmtree(leftover, ignore_errors=True)


def _is_running(process: int) -> bool:
    if os.name == "nt":
        return True  # a signal 0 would end it there
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _may_write_card(path: Path) -> bool:
    """A card that somebody has written stays."""
    return not path.exists() or GENERATED_MARKER in path.read_text(encoding="utf-8", errors="replace")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _flush(path: Path) -> None:
    """Have the disk hold what was written: a rename must not survive a power cut that the content didn't."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
