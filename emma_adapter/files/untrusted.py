"""Files that others made: only regular files are opened, and deeply nested JSON is refused."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import CheckpointError
from ..messages import plain

#: Levels of nested lists and objects. More are refused, so that walking over a value never ends in a RecursionError,
#: however deep the stack is where the walk starts.
MAX_NESTING = 80


def open_regular(path: Path, folder: Path | None = None) -> BinaryIO:
    """Open a regular file for reading; a pipe or a device, which might never end, is not even opened.

    Args:
        path: the file, or a link to one.
        folder: the folder that links must not lead out of, if any. From a snapshot in the hub's cache they may lead to
            the blobs of the same repository, where huggingface_hub keeps its files.

    Raises:
        FileNotFoundError: if there is none.
        CheckpointError: if it is no regular file, or a link out of ``folder``, or can't be opened.
    """
    try:
        target = Path(os.path.realpath(path, strict=True))
        if folder is not None and not _belongs_to(target, Path(os.path.realpath(folder))):
            raise CheckpointError(
                f"{path} is a link out of {folder}, to {target}: nothing outside of an adapter's folder is read. "
                "Copy the file into it"
            )
        _require_regular(os.stat(target).st_mode, path)
        # Something may have taken its place since: a link isn't followed, and a pipe isn't waited for.
        flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0)
        descriptor = os.open(target, flags)
        try:
            _require_regular(os.fstat(descriptor).st_mode, path)
        except BaseException:
            os.close(descriptor)
            raise
        return os.fdopen(descriptor, "rb")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error}; download or copy it again") from error


def _require_regular(mode: int, path: Path) -> None:
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, a socket or a device"
        raise CheckpointError(f"{path} can't be read: it should be a file and is {kind}; download or copy it again")


def _belongs_to(target: Path, folder: Path) -> bool:
    if target.is_relative_to(folder):
        return True
    # <cache>/models--<org>--<name>/snapshots/<commit>/… links to <cache>/models--<org>--<name>/blobs/….
    snapshots = next((parent for parent in folder.parents if parent.name == "snapshots"), None)
    return (
        snapshots is not None
        and snapshots.parent.name.startswith("models--")
        and target.parent == snapshots.parent / "blobs"
    )


def parse_json(text: str | bytes) -> Any:
    """Parse a JSON text.

    Raises:
        ValueError: if it isn't JSON, or is nested more than :data:`MAX_NESTING` deep.
    """
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(plain(str(error))) from error
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if nests_deeper(value, MAX_NESTING):
        raise ValueError(f"nested more than {MAX_NESTING} levels deep")
    return value


def nests_deeper(value: object, levels: int) -> bool:
    """Return whether lists and mappings are nested more than ``levels`` deep."""
    level = [value]
    for _ in range(levels + 1):
        level = [child for parent in level for child in _children(parent)]
    return bool(level)


def _children(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, (list, tuple)) else ()
