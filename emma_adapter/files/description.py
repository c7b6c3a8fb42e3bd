"""The config file of a saved folder, which its tensor file repeats: read from a stranger, and compared with that."""

from __future__ import annotations

from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..messages import plain, shown
from ..version import __version__
from .untrusted import open_regular, parse_json

#: In bytes. Configs have a few hundred, or as many more as there are options and latent channels.
_MAX_CONFIG = 2**20


def read_text(path: Path, given: Path, *, writer: str) -> str:
    """Return the text of a config file.

    Args:
        path: the file.
        given: the folder that links must not lead out of.
        writer: what writes such files, for the message.

    Raises:
        CheckpointError: if there is none, or it can't be read, or is too large.
    """
    try:
        with open_regular(path, given) as file:
            content = file.read(_MAX_CONFIG + 1)
        text = content.decode("utf-8")
    except FileNotFoundError as error:
        raise CheckpointError(
            f"there is no {path.name} in {path.parent}: give the folder that {writer} wrote"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} can't be read: {error}; take another copy") from error
    if len(content) > _MAX_CONFIG:
        raise CheckpointError(
            f"{path} has more than {_MAX_CONFIG:,} bytes: that is no adapter's config; take another copy"
        )
    return text


def parse(text: str, path: Path) -> Any:
    """Return the value of a description's JSON.

    Raises:
        CheckpointError: if it isn't JSON.
    """
    try:
        return parse_json(text)
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}; take another copy") from error


def check_version(description: Mapping[str, Any], path: Path, newest: int) -> None:
    """Check that this library reads a description's version of the format.

    Raises:
        CheckpointError: if it is none, or newer than ``newest``.
    """
    version = description.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise CheckpointError(
            f"{path}: format_version should be an integer >= 1 and is {shown(version)}; take another copy"
        )
    if version > newest:
        raise CheckpointError(
            f"{path.parent} has format_version {shown(version)}, written by emma_adapter "
            f"{plain(str(description.get('library_version')))}; this is emma_adapter {__version__}, which reads up to "
            f"{newest}: upgrade emma_adapter"
        )


def edited_fields(written: object, embedded: object, editable: Set[str]) -> list[str]:
    """Return what differs between the config of the config file and that of the tensor file, but for what may."""
    if not isinstance(written, dict) or not isinstance(embedded, dict):
        return [] if written == embedded else ["config"]
    names = (set(written) | set(embedded)) - editable
    return sorted(name for name in names if written.get(name) != embedded.get(name))
