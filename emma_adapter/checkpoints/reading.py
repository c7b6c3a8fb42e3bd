"""Adapter folders and how they are read: ``adapter_config.json``, ``adapter_model.safetensors`` and a model card.

The tensor file alone is a complete adapter, because its metadata repeats the config: replacing that one file is
the moment at which a save takes effect. The config file carries the same ``save_id``; where the two differ, a
save was interrupted after that moment, and the metadata is right.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..alignment.config import EmmaConfig
from ..alignment.module import EmmaAlignment
from ..errors import CheckpointError, ConfigError
from ..files import description
from ..files.tensor_file import digest, read_header, read_tensors
from ..files.untrusted import open_regular
from ..messages import listed, plain, shown
from ..patching import sites
from ..patching.sites import DEFAULT
from .format import (
    ALIGNMENT_PREFIX,
    CONFIG_NAME,
    FORMAT,
    FORMAT_VERSION,
    MODEL_CONFIG_NAME,
    PROJECTOR_PREFIX,
    SUBFOLDER,
    WEIGHTS_NAME,
    SavedAdapter,
)

#: Config fields that may be edited in a saved folder: they don't change what the weights compute.
_EDITABLE = frozenset({"cache_size", "instruction_encoder", "instruction_policy", "kernel"})


def find(directory: Path, name: str = DEFAULT) -> Path:
    """The adapter folder that is meant by ``directory``: itself; or, beside a base model or a LoRA, one in its
    ``emma_adapter/``, where the one called ``name`` goes first. If there is none, the folder itself.

    Raises:
        CheckpointError: if there are several and none is called so.
    """
    beside = directory / SUBFOLDER
    if is_adapter(directory) or not beside.is_dir():
        return directory
    if is_adapter(beside, directory):
        return beside
    named = {folder.name: folder for folder in sorted(beside.iterdir()) if is_adapter(folder, directory)}
    if len(named) > 1 and name not in named:
        raise CheckpointError(f"{beside} holds the adapters {listed(named)}; give the folder of one of them")
    return named.get(name) or next(iter(named.values()), directory)


def is_adapter(directory: Path, given: Path | None = None) -> bool:
    """Whether the config in a folder, which may be one within the folder that was ``given``, says that it is an
    adapter of this library."""
    try:
        _read_description(directory / CONFIG_NAME, given or directory)
    except CheckpointError:
        return False
    return True


def holds_model(directory: Path) -> bool:
    """Whether a folder is one that transformers loads a model from. With an ``adapter_config.json`` in it, transformers
    would take it for an adapter of PEFT."""
    try:
        config = json.loads((directory / MODEL_CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and ("model_type" in config or "architectures" in config)


def read(given: Path, check: Callable[[SavedAdapter], None] | None = None) -> SavedAdapter:
    """Read and check an adapter folder; its tensors are on the CPU.

    Args:
        given: the folder, or one that has adapters beside other things; see :func:`find`.
        check: called before the values are read, which may be many, with the adapter as the header of its file tells
            it: tensors on the meta device. What it raises is raised.

    Raises:
        CheckpointError: naming what is wrong with which file.
    """
    directory = find(given)
    config_path, weights_path = directory / CONFIG_NAME, directory / WEIGHTS_NAME
    written = _read_description(config_path, given)
    description.check_version(written, config_path, FORMAT_VERSION)
    # Opened once: what is checked is what is loaded, and it stays so if the file is written to later.
    with _open_weights(weights_path, given) as file:
        tensors, metadata = read_header(file, weights_path)
        if not isinstance(metadata.get(FORMAT), str):
            raise CheckpointError(
                f"{weights_path} was not written by emma_adapter: its metadata lacks {FORMAT!r}; give "
                "the folder that adapter.save_pretrained wrote"
            )
        embedded = _parse_description(metadata[FORMAT], weights_path)
        if embedded.get("save_id") != written.get("save_id"):
            # Interrupted between the two replacements: the tensor file is the newer one.
            written = embedded
        if edited := description.edited_fields(written.get("config"), embedded.get("config"), _EDITABLE):
            raise CheckpointError(
                f"{config_path} was changed since the adapter was saved, in {listed(edited)}: the weights were made "
                "for the config they were saved with; undo the changes, or train a new adapter"
            )
        description.check_version(written, config_path, FORMAT_VERSION)
        try:
            config = EmmaConfig.from_dict(written.get("config", {}))
        except (ConfigError, TypeError) as error:
            raise CheckpointError(f"{config_path}: {error}; take another copy") from error
        alignment, projector = _split(tensors, written, directory)
        described = SavedAdapter(
            source=directory,
            config=config,
            model_type=_text(written, "model_type", config_path),
            alignment=alignment,
            projector=projector,
            reads_turns=written.get("reads_turns") is True,
            intact=None,
            base_model=_optional_text(written, "base_model_name_or_path", config_path),
            library_version=_optional_text(written, "library_version", config_path),
        )
        expected = _expected_alignment(config, alignment, directory)
        check_tensors(alignment, expected, weights_path)
        if check is not None:
            check(described)
        tensors = read_tensors(file, weights_path)
    alignment, projector = _split(tensors, written, directory)
    check_tensors(alignment, expected, weights_path)
    intact = digest(tensors) == embedded.get("sha256")
    return dataclasses.replace(described, alignment=alignment, projector=projector, intact=intact)


def check_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> None:
    """Raises:
    CheckpointError: naming missing, unexpected and misshapen tensors, or one that isn't finite.
    """
    problems = []
    if missing := sorted(set(expected) - set(found)):
        problems.append(f"missing tensor(s) {listed(missing)}")
    if unexpected := sorted(set(found) - set(expected)):
        problems.append(f"unexpected tensor(s) {listed(unexpected)}")
    for name in sorted(set(found) & set(expected)):
        tensor, wanted = found[name], expected[name]
        if tensor.shape != wanted.shape:
            problems.append(f"{name} is {list(tensor.shape)} and should be {list(wanted.shape)}")
        elif wanted.is_floating_point() and not tensor.is_floating_point():
            problems.append(f"{name} is {tensor.dtype} and should be a floating-point tensor")
        elif not wanted.is_floating_point() and tensor.dtype != wanted.dtype:
            problems.append(f"{name} is {tensor.dtype} and should be {wanted.dtype}")
        elif not tensor.is_meta and not bool(torch.isfinite(tensor.to(wanted.dtype)).all()):
            problems.append(f"{name} holds NaN or infinite values, in {wanted.dtype}")
    if problems:
        raise CheckpointError(
            f"{path} doesn't fit its config or the model: {'; '.join(problems)}. Take another copy, or load it into "
            "the model it was made for, in the dtype it was trained in"
        )


def _read_description(path: Path, given: Path) -> dict[str, Any]:
    text = description.read_text(path, given, writer="adapter.save_pretrained")
    return _parse_description(text, path)


def _parse_description(text: str, path: Path) -> dict[str, Any]:
    described = description.parse(text, path)
    if isinstance(described, dict) and "peft_type" in described:
        raise CheckpointError(
            f"{path} describes an adapter of PEFT ({plain(str(described['peft_type']))}), not of emma_adapter: load "
            "it with peft.PeftModel.from_pretrained"
        )
    if not isinstance(described, dict) or described.get("format") != FORMAT:
        raise CheckpointError(f"{path} doesn't describe an emma_adapter: load it with the tool that wrote it")
    return described


def _text(described: Mapping[str, Any], name: str, path: Path) -> str:
    value = described.get(name)
    if not isinstance(value, str):
        raise CheckpointError(f"{path}: {name} should be a text and is {shown(value)}; take another copy")
    return value


def _optional_text(described: Mapping[str, Any], name: str, path: Path) -> str | None:
    return None if described.get(name) is None else _text(described, name, path)


def _open_weights(path: Path, given: Path) -> BinaryIO:
    try:
        return open_regular(path, given)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"there is no {path.name} in {path.parent}: the adapter's weights are missing; copy the whole folder"
        ) from error


def _split(
    tensors: Mapping[str, Tensor], described: Mapping[str, Any], directory: Path
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The alignment's tensors and the projector's, by their names in the model."""
    alignment, projector = _with_prefix(tensors, ALIGNMENT_PREFIX), _with_prefix(tensors, PROJECTOR_PREFIX)
    if stray := sorted(name for name in tensors if not name.startswith((ALIGNMENT_PREFIX, PROJECTOR_PREFIX))):
        raise CheckpointError(f"{directory / WEIGHTS_NAME}: unexpected tensor(s) {listed(stray)}; take another copy")
    if bool(projector) != bool(described.get("projector_trained")):
        raise CheckpointError(
            f"{directory}: the config says projector_trained={shown(described.get('projector_trained'))}, but the "
            f"file holds {len(projector)} projector tensors; take another copy"
        )
    return alignment, projector


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _expected_alignment(config: EmmaConfig, found: Iterable[str], directory: Path) -> dict[str, Tensor]:
    """The tensors of an adapter with this config; how many deepstack projectors it sits at, ``found`` tells."""
    try:
        with torch.device("meta"):
            expected = EmmaAlignment(config).state_dict()
    except (ConfigError, RuntimeError, OverflowError, TypeError, AssertionError) as error:
        raise CheckpointError(
            f"{directory / CONFIG_NAME} describes no adapter that can be built: {plain(str(error))}; take another copy"
        ) from error
    places = [sites.MAIN_PLACE]
    if config.align_deepstack:
        places += sorted({match[0] for name in found if (match := sites.DEEPSTACK_PLACE.match(name))})
    return {place + name: tensor for place in places for name, tensor in expected.items()}
