"""Adapter folders and how they are read: ``adapter_config.json``, ``adapter_model.safetensors`` and a model card.

The tensor file alone is a complete adapter, because its metadata repeats the config: replacing that one file is
the moment at which a save takes effect. The config file carries the same ``save_id``; where the two differ, a
save was interrupted after that moment, and the metadata is right.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor

from . import attachment
from .alignment import EmmaAlignment
from .config import EmmaConfig
from .errors import CheckpointError, ConfigError
from .state import DEFAULT
from .version import __version__

FORMAT_VERSION = 1
CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
CARD_NAME = "README.md"
#: Where ``model.save_pretrained`` puts adapters, beside the base model or the LoRA.
SUBFOLDER = "emma_adapter"

#: What the config file, and the metadata of the tensor file, call the format and the config's key.
FORMAT = "emma_adapter"
ALIGNMENT_PREFIX = "alignment."
PROJECTOR_PREFIX = "projector."
#: Config fields that may be edited in a saved folder: they don't change what the weights compute.
_EDITABLE = frozenset({"cache_size", "instruction_encoder", "instruction_policy", "kernel"})


@dataclass(frozen=True)
class SavedAdapter:
    """A checked adapter folder. ``projector`` is empty unless the projector was trained with the adapter."""

    source: Path
    config: EmmaConfig
    model_type: str
    alignment: dict[str, Tensor]
    projector: dict[str, Tensor]
    #: True if the instruction was found by a processor's chat template.
    reads_turns: bool
    #: False if the tensors aren't those that were saved.
    intact: bool
    #: Hub id or folder of the model it was trained on, if that was known.
    base_model: str | None
    #: Of the library that wrote it.
    library_version: str


def find(directory: Path, name: str = DEFAULT) -> Path:
    """The adapter folder that is meant by ``directory``: itself; or, beside a base model or a LoRA, one in its
    ``emma_adapter/``, where the one called ``name`` goes first. If there is none, the folder itself.

    Raises:
        CheckpointError: if there are several and none is called so.
    """
    beside = directory / SUBFOLDER
    if is_adapter(directory) or not beside.is_dir():
        return directory
    if is_adapter(beside):
        return beside
    named = {folder.name: folder for folder in sorted(beside.iterdir()) if is_adapter(folder)}
    if len(named) > 1 and name not in named:
        raise CheckpointError(f"{beside} holds the adapters {list(named)}; give the folder of one of them")
    return named.get(name) or next(iter(named.values()), directory)


def is_adapter(directory: Path) -> bool:
    """Whether the config in a folder says that it is an adapter of this library."""
    try:
        _read_description(directory / CONFIG_NAME)
    except CheckpointError:
        return False
    return True


def read(directory: Path) -> SavedAdapter:
    """Read and check an adapter folder; its tensors are on the CPU.

    Raises:
        CheckpointError: naming what is wrong with which file.
    """
    directory = find(directory)
    written = _read_description(directory / CONFIG_NAME)
    _check_version(written, directory)
    tensors, embedded = _read_tensors(directory / WEIGHTS_NAME)
    if embedded.get("save_id") != written.get("save_id"):
        # Interrupted between the two replacements: the tensor file is the newer one.
        written = embedded
    if edited := _edited_fields(written.get("config"), embedded.get("config")):
        raise CheckpointError(
            f"{directory / CONFIG_NAME} was changed since the adapter was saved, in {edited}: the weights were made "
            "for the config they were saved with"
        )
    _check_version(written, directory)
    try:
        config = EmmaConfig.from_dict(written.get("config", {}))
    except (ConfigError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{directory / CONFIG_NAME}: {error}") from error
    model_type = written.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(f"{directory / CONFIG_NAME}: model_type should be a text and is {model_type!r}")
    alignment = _with_prefix(tensors, ALIGNMENT_PREFIX)
    projector = _with_prefix(tensors, PROJECTOR_PREFIX)
    if stray := sorted(
        set(tensors) - {ALIGNMENT_PREFIX + n for n in alignment} - {PROJECTOR_PREFIX + n for n in projector}
    ):
        raise CheckpointError(f"{directory / WEIGHTS_NAME}: unexpected tensor(s) {stray}")
    if bool(projector) != bool(written.get("projector_trained")):
        raise CheckpointError(
            f"{directory}: the config says projector_trained={written.get('projector_trained')}, but the file holds "
            f"{len(projector)} projector tensors"
        )
    check_tensors(alignment, _expected_alignment(config, alignment, directory), directory / WEIGHTS_NAME)
    return SavedAdapter(
        source=directory,
        config=config,
        model_type=model_type,
        alignment=alignment,
        projector=projector,
        reads_turns=written.get("reads_turns") is True,
        intact=digest(tensors) == embedded.get("sha256"),
        base_model=written.get("base_model_name_or_path"),
        library_version=str(written.get("library_version")),
    )


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes: safetensors itself doesn't notice changed values."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        found.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def check_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> None:
    """Raises:
    CheckpointError: naming missing, unexpected and misshapen tensors, or one that isn't finite.
    """
    problems = []
    if missing := sorted(set(expected) - set(found)):
        problems.append(f"missing tensor(s) {missing}")
    if unexpected := sorted(set(found) - set(expected)):
        problems.append(f"unexpected tensor(s) {unexpected}")
    for name in sorted(set(found) & set(expected)):
        tensor, wanted = found[name], expected[name]
        if tensor.shape != wanted.shape:
            problems.append(f"{name} is {list(tensor.shape)} and should be {list(wanted.shape)}")
        elif not tensor.is_floating_point():
            problems.append(f"{name} is {tensor.dtype} and should be a floating-point tensor")
        elif not bool(torch.isfinite(tensor.float()).all()):
            problems.append(f"{name} holds NaN or infinite values")
    if problems:
        raise CheckpointError(f"{path} doesn't fit its config or the model: {'; '.join(problems)}")


def _read_description(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise CheckpointError(
            f"there is no {path.name} in {path.parent}: give the folder that adapter.save_pretrained wrote"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} can't be read: {error}") from error
    return _parse_description(text, path)


def _parse_description(text: str, path: Path) -> dict[str, Any]:
    try:
        description = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON (truncated?): {error}") from error
    if isinstance(description, dict) and "peft_type" in description:
        raise CheckpointError(
            f"{path} describes an adapter of PEFT ({description['peft_type']}), not of emma_adapter: load it with "
            "peft.PeftModel.from_pretrained"
        )
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise CheckpointError(f"{path} doesn't describe an emma_adapter; another tool's adapter?")
    return description


def _check_version(description: Mapping[str, Any], directory: Path) -> None:
    version = description.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise CheckpointError(f"{directory / CONFIG_NAME}: format_version should be an integer >= 1 and is {version!r}")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{directory} has format_version {version}, written by emma_adapter {description.get('library_version')}; "
            f"this is emma_adapter {__version__}, which reads up to {FORMAT_VERSION}: upgrade emma_adapter"
        )


def _edited_fields(written: object, embedded: object) -> list[str]:
    if not isinstance(written, dict) or not isinstance(embedded, dict):
        return [] if written == embedded else ["config"]
    names = (set(written) | set(embedded)) - _EDITABLE
    return sorted(str(name) for name in names if written.get(name) != embedded.get(name))


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not path.is_file():
        raise CheckpointError(f"there is no {path.name} in {path.parent}: the adapter's weights are missing")
    try:
        # At once: safetensors' own opens the file twice, and a save may replace it in between.
        content = path.read_bytes()
        tensors = load_tensors(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} is not a valid safetensors file (truncated or corrupted?): {error}") from error
    metadata = header.get("__metadata__", {})
    if FORMAT not in metadata:
        raise CheckpointError(f"{path} was not written by emma_adapter: its metadata lacks {FORMAT!r}")
    return tensors, _parse_description(metadata[FORMAT], path)


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _expected_alignment(config: EmmaConfig, found: Iterable[str], directory: Path) -> dict[str, Tensor]:
    """The tensors of an adapter with this config; how many deepstack projectors it sits at, ``found`` tells."""
    try:
        with torch.device("meta"):
            expected = EmmaAlignment(config).state_dict()
    except (ConfigError, RuntimeError, OverflowError, TypeError, AssertionError) as error:
        raise CheckpointError(f"{directory / CONFIG_NAME} describes no adapter that can be built: {error}") from error
    places = [attachment.MAIN_PLACE]
    if config.align_deepstack:
        places += sorted({match[0] for name in found if (match := attachment.DEEPSTACK_PLACE.match(name))})
    return {place + name: tensor for place in places for name, tensor in expected.items()}
