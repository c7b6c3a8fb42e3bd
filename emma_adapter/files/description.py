"""The config file of a saved folder: read without trust, and compared with the copy in the tensor file.

The tensor file alone is complete, because its metadata repeats the config file: a save takes effect at the moment at
which it is replaced. Where the config file names another checksum of the tensors, a save was interrupted after that
moment, and the metadata is right.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import CheckpointError
from ..messages import listed, plain, shown
from ..version import __version__
from .tensor_file import digest
from .untrusted import open_regular, parse_json

#: In bytes. Most configs have a few hundred; options and latent channels add to that.
_MAX_CONFIG = 2**20
_CHECKSUM = "sha256"


@dataclass(frozen=True)
class FolderFormat:
    """The names and the version of one kind of folders."""

    #: The format's name in the config file, and the config's key in the metadata of the tensor file.
    name: str
    #: The newest version that this library reads, and the one it writes.
    version: int
    config_name: str
    weights_name: str
    #: The call that writes such folders, for messages.
    writer: str
    #: Config fields that may be edited in a saved folder: they don't change what the weights compute.
    editable: frozenset[str]


def describe(
    kind: FolderFormat, base: Any, tensors: Mapping[str, Tensor], entries: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the description of tensors that are to be saved.

    Args:
        kind: of folder.
        base: config of the model that they are for.
        tensors: on the CPU.
        entries: of this kind of folder, ``config`` among them.
    """
    return {
        "format": kind.name,
        "format_version": kind.version,
        "library_version": __version__,
        _CHECKSUM: digest(tensors),
        "base_model_name_or_path": getattr(base, "name_or_path", "") or None,
        "model_type": base.model_type,
        **entries,
    }


def encoded(kind: FolderFormat, description: Mapping[str, Any]) -> tuple[dict[str, str], bytes]:
    """Return a description as the metadata of the tensor file, and as the config file."""
    metadata = {"format": "pt", kind.name: json.dumps(description, sort_keys=True)}
    return metadata, (json.dumps(description, indent=2, sort_keys=True) + "\n").encode()


def read(kind: FolderFormat, folder: Path, root: Path) -> dict[str, Any]:
    """Return what the config file of a folder says.

    Args:
        kind: of folder.
        folder: with the file.
        root: the folder that links must not lead out of.

    Raises:
        CheckpointError: if the file is missing, unreadable, too large, or describes something else.
    """
    path = folder / kind.config_name
    try:
        with open_regular(path, root) as file:
            content = file.read(_MAX_CONFIG + 1)
        text = content.decode("utf-8")
    except FileNotFoundError as error:
        raise CheckpointError(
            f"there is no {path.name} in {folder}: give the folder that {kind.writer} wrote"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} can't be read: {error}; download or copy it again") from error
    if len(content) > _MAX_CONFIG:
        raise CheckpointError(
            f"{path} has more than {_MAX_CONFIG:,} bytes: that is no adapter's config; download or copy it again"
        )
    return parse(kind, text, path)


def parse(kind: FolderFormat, text: str, path: Path) -> dict[str, Any]:
    """Return a description from its JSON.

    Raises:
        CheckpointError: if it isn't JSON, or describes something else.
    """
    try:
        description = parse_json(text)
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}; download or copy it again") from error
    if isinstance(description, dict) and "peft_type" in description:
        raise CheckpointError(
            f"{path} describes an adapter of PEFT ({plain(str(description['peft_type']))}), not of emma_adapter: load "
            "it with peft.PeftModel.from_pretrained"
        )
    if not isinstance(description, dict) or description.get("format") != kind.name:
        raise CheckpointError(f"{path} doesn't describe what {kind.writer} writes: load it with the tool that wrote it")
    return description


def of_tensors(kind: FolderFormat, written: dict[str, Any], embedded: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the description that belongs to the tensors of a folder.

    Args:
        kind: of folder.
        written: what the config file says, in which some fields of the config may have been edited.
        embedded: what the tensor file says.
        folder: for messages.

    Raises:
        CheckpointError: if another field of the config was edited.
    """
    if written.get(_CHECKSUM) != embedded.get(_CHECKSUM):
        # The save was interrupted between the two replacements: the tensor file is the newer one.
        return embedded
    if edited := _edited_fields(written.get("config"), embedded.get("config"), kind.editable):
        raise CheckpointError(
            f"{folder / kind.config_name} was changed since it was saved, in {listed(edited)}: the weights were made "
            "for the config they were saved with; undo the changes, or train anew"
        )
    return written


def check_version(description: Mapping[str, Any], path: Path, newest: int) -> None:
    """Check that this library can read a description's version of the format.

    Raises:
        CheckpointError: if it is no version, or newer than ``newest``.
    """
    version = description.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise CheckpointError(
            f"{path}: format_version should be an integer >= 1 and is {shown(version)}; download or copy it again"
        )
    if version > newest:
        raise CheckpointError(
            f"{path.parent} has format_version {shown(version)}, written by emma_adapter "
            f"{plain(str(description.get('library_version')))}; this is emma_adapter {__version__}, which reads up to "
            f"{newest}: upgrade emma_adapter"
        )


def _edited_fields(written: object, embedded: object, editable: frozenset[str]) -> list[str]:
    """Return the config fields, other than ``editable`` ones, that differ between config file and tensor file."""
    if not isinstance(written, dict) or not isinstance(embedded, dict):
        return [] if written == embedded else ["config"]
    names = (set(written) | set(embedded)) - editable
    return sorted(name for name in names if written.get(name) != embedded.get(name))
