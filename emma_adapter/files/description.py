"""The config file of a saved folder: read without trust, and compared with the copy in the tensor file."""

from __future__ import annotations

from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..messages import plain, shown
from ..version import __version__
from .untrusted import open_regular, parse_json

#: In bytes. Most configs have a few hundred; options and latent channels add to that.
_MAX_CONFIG = 2**20


def read_text(path: Path, root: Path, *, writer: str) -> str:
    """Return the text of a config file.

    Args:
        path: the file.
        root: the folder that links must not lead out of.
        writer: what writes such files, for the message.

    Raises:
        CheckpointError: if the file is missing, unreadable or too large.
    """
    try:
        with open_regular(path, root) as file:
            content = file.read(_MAX_CONFIG + 1)
        text = content.decode("utf-8")
    except FileNotFoundError as error:
        raise CheckpointError(
            f"there is no {path.name} in {path.parent}: give the folder that {writer} wrote"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} can't be read: {error}; download or copy it again") from error
    if len(content) > _MAX_CONFIG:
        raise CheckpointError(
            f"{path} has more than {_MAX_CONFIG:,} bytes: that is no adapter's config; download or copy it again"
        )
    return text


def parse(text: str, path: Path) -> Any:
    """Parse the JSON of a description.

    Raises:
        CheckpointError: if it isn't JSON.
    """
    try:
        return parse_json(text)
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}; download or copy it again") from error


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


def edited_fields(written: object, embedded: object, editable: Set[str]) -> list[str]:
    """Return the config fields, other than ``editable`` ones, that differ between config file and tensor file."""
    if not isinstance(written, dict) or not isinstance(embedded, dict):
        return [] if written == embedded else ["config"]
    names = (set(written) | set(embedded)) - editable
    return sorted(name for name in names if written.get(name) != embedded.get(name))
