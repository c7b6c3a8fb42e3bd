"""Reading adapter folders: ``adapter_config.json``, ``adapter_model.safetensors`` and a model card."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..alignment.config import EmmaConfig
from ..alignment.module import EmmaAlignment
from ..errors import CheckpointError, ConfigError
from ..files import description
from ..files.tensor_file import digest, read_tensors
from ..files.tensor_folder import SavedFolder, open_folder
from ..messages import listed, plain, shown
from ..patching import sites
from ..patching.sites import DEFAULT
from .format import (
    ALIGNMENT_PREFIX,
    CONFIG_NAME,
    FORMAT,
    MODEL_CONFIG_NAME,
    PROJECTOR_PREFIX,
    SUBFOLDER,
    WEIGHTS_NAME,
    SavedAdapter,
)


def find(directory: Path, name: str = DEFAULT) -> Path:
    """Return the adapter folder that ``directory`` stands for.

    This is the folder itself; or, where it holds a base model or a LoRA, one in its ``emma_adapter/``, preferably the
    one called ``name``. If there is none, it is the folder itself.

    Raises:
        CheckpointError: if there are several and none has that name.
    """
    beside = directory / SUBFOLDER
    if is_adapter(directory) or not beside.is_dir():
        return directory
    if is_adapter(beside, directory):
        return beside
    adapters = {folder.name: folder for folder in sorted(beside.iterdir()) if is_adapter(folder, directory)}
    if len(adapters) > 1 and name not in adapters:
        raise CheckpointError(f"{beside} holds the adapters {listed(adapters)}; give the folder of one of them")
    return adapters.get(name) or next(iter(adapters.values()), directory)


def is_adapter(directory: Path, root: Path | None = None) -> bool:
    """Return whether the config in a folder describes an adapter of this library.

    ``root`` is the folder that links must not lead out of; default: ``directory``.
    """
    try:
        description.read(FORMAT, directory, root or directory)
    except CheckpointError:
        return False
    return True


def holds_model(directory: Path) -> bool:
    """Return whether transformers loads a model from a folder.

    With an ``adapter_config.json`` in it, transformers would take the folder for an adapter of PEFT.
    """
    try:
        config = json.loads((directory / MODEL_CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and ("model_type" in config or "architectures" in config)


def read(folder: Path, check: Callable[[SavedAdapter], None] | None = None) -> SavedAdapter:
    """Read and check an adapter folder; its tensors are on the CPU.

    Args:
        folder: the adapter folder, or one that has adapters beside other things; see :func:`find`.
        check: called before the values, which may be large, are read; its argument is the adapter as the file's header
            describes it, with tensors on the meta device. Its errors are passed on.

    Raises:
        CheckpointError: naming what is wrong with which file.
    """
    directory = find(folder)
    saved, file = open_folder(FORMAT, directory, folder)
    written, weights_path = saved.written, saved.weights_path
    with file:
        try:
            config = EmmaConfig.from_dict(written.get("config", {}))
        except (ConfigError, TypeError) as error:
            raise CheckpointError(f"{saved.config_path}: {error}; download or copy it again") from error
        alignment, projector = _split(saved.tensors, written, directory)
        described = SavedAdapter(
            source=directory,
            config=config,
            model_type=saved.model_type,
            alignment=alignment,
            projector=projector,
            reads_turns=written.get("reads_turns") is True,
            intact=None,
            base_model=_optional_text(saved, "base_model_name_or_path"),
            library_version=_optional_text(saved, "library_version"),
        )
        expected = _expected_alignment(config, alignment, directory)
        check_tensors(alignment, expected, weights_path)
        if check is not None:
            check(described)
        tensors = read_tensors(file, weights_path)
    alignment, projector = _split(tensors, written, directory)
    check_tensors(alignment, expected, weights_path)
    intact = digest(tensors) == saved.sha256
    return dataclasses.replace(described, alignment=alignment, projector=projector, intact=intact)


def check_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> None:
    """Check that tensors have the names, shapes and kinds of dtype that are expected, and finite values.

    Raises:
        CheckpointError: naming missing, unexpected and misshapen tensors, and those that aren't finite.
    """
    problems = []
    if missing := sorted(set(expected) - set(tensors)):
        problems.append(f"missing tensor(s) {listed(missing)}")
    if unexpected := sorted(set(tensors) - set(expected)):
        problems.append(f"unexpected tensor(s) {listed(unexpected)}")
    for name in sorted(set(tensors) & set(expected)):
        tensor, expected_tensor = tensors[name], expected[name]
        if tensor.shape != expected_tensor.shape:
            problems.append(f"{name} is {list(tensor.shape)} and should be {list(expected_tensor.shape)}")
        elif expected_tensor.is_floating_point() and not tensor.is_floating_point():
            problems.append(f"{name} is {tensor.dtype} and should be a floating-point tensor")
        elif not expected_tensor.is_floating_point() and tensor.dtype != expected_tensor.dtype:
            problems.append(f"{name} is {tensor.dtype} and should be {expected_tensor.dtype}")
        elif not tensor.is_meta and not bool(torch.isfinite(tensor.to(expected_tensor.dtype)).all()):
            problems.append(f"{name} holds NaN or infinite values, in {expected_tensor.dtype}")
    if problems:
        raise CheckpointError(
            f"{path} doesn't fit its config or the model: {'; '.join(problems)}. Download or copy it again, or load "
            "it into the model it was made for, in the dtype it was trained in"
        )


def _optional_text(saved: SavedFolder, name: str) -> str | None:
    value = saved.written.get(name)
    return None if value is None else saved.text(name, value)


def _split(
    tensors: Mapping[str, Tensor], described: Mapping[str, Any], directory: Path
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the alignment's tensors and the projector's, by name in the model."""
    alignment, projector = _with_prefix(tensors, ALIGNMENT_PREFIX), _with_prefix(tensors, PROJECTOR_PREFIX)
    if stray := sorted(name for name in tensors if not name.startswith((ALIGNMENT_PREFIX, PROJECTOR_PREFIX))):
        raise CheckpointError(
            f"{directory / WEIGHTS_NAME}: unexpected tensor(s) {listed(stray)}; download or copy it again"
        )
    if bool(projector) != bool(described.get("projector_trained")):
        raise CheckpointError(
            f"{directory}: the config says projector_trained={shown(described.get('projector_trained'))}, but the "
            f"file holds {len(projector)} projector tensors; download or copy it again"
        )
    return alignment, projector


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _expected_alignment(config: EmmaConfig, saved_names: Iterable[str], directory: Path) -> dict[str, Tensor]:
    """Return the tensors of an adapter with this config, on the meta device.

    ``saved_names`` tell how many deepstack projectors it sits at.
    """
    try:
        with torch.device("meta"):
            expected = EmmaAlignment(config).state_dict()
    except (ConfigError, RuntimeError, OverflowError, TypeError, AssertionError) as error:
        raise CheckpointError(
            f"{directory / CONFIG_NAME} describes no adapter that can be built: {plain(str(error))}; download or copy "
            "it again"
        ) from error
    places = [sites.MAIN_PLACE]
    if config.align_deepstack:
        places += sorted({match[0] for name in saved_names if (match := sites.DEEPSTACK_PLACE.match(name))})
    return {place + name: tensor for place in places for name, tensor in expected.items()}
