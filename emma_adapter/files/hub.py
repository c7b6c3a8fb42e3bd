"""From a folder or a hub id to a local folder with the files that are asked for."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable
from os import PathLike
from pathlib import Path, PurePosixPath, PureWindowsPath

from ..errors import CheckpointError


def is_local(source: str | PathLike[str]) -> bool:
    """Whether ``source`` is a folder here, and not the id of a repository on the hub."""
    return Path(source).is_dir()


def is_hub_id(source: str) -> bool:
    """Whether what has this name would be looked for on the hub, and nowhere on this machine."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(source)
    except HFValidationError:
        return False
    # transformers and diffusers take a folder of that name, if there is one.
    return not os.path.lexists(source)


def local_folder(
    source: str | PathLike[str],
    patterns: Iterable[str],
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Path:
    """Return ``source`` if it is a folder; else where the files of that hub repository are, downloaded if need be. With
    ``subfolder``, that folder in it.

    Args:
        source: a folder, or a hub id.
        patterns: of the files that are downloaded, as seen from ``subfolder``.
        revision: branch, tag or commit on the hub.
        subfolder: a path downwards.
        token: of the hub; None and True: the one that is stored; False: none.
        local_files_only: don't ask the hub; use what was downloaded before.

    Raises:
        CheckpointError: if it is neither, or if ``subfolder`` leads out of it.
    """
    within = _checked_subfolder(subfolder)
    if is_local(source):
        return _folder_within(Path(source), within)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    before = glob.escape(within.as_posix()) + "/" if within.parts else ""
    try:
        folder = snapshot_download(
            str(source),
            revision=revision,
            token=token,
            local_files_only=local_files_only,
            allow_patterns=[before + pattern for pattern in patterns],
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{source} is neither a folder here nor an adapter that the hub gives: check the path, or the name and "
            f"whether it was downloaded before; a private one needs token=, or hf auth login ({error})"
        ) from error
    return _folder_within(Path(folder), within)


def _checked_subfolder(subfolder: str | None) -> PurePosixPath:
    """Raises:
    CheckpointError: if it isn't a path downwards.
    """
    within = PurePosixPath((subfolder or "").replace("\\", "/"))
    if within.is_absolute() or PureWindowsPath(within).drive or ".." in within.parts:
        raise CheckpointError(
            f"subfolder={subfolder!r} leads out of the folder or repository, of which nothing outside is read: name "
            'one that is in it, as "last-checkpoint"'
        )
    return within


def _folder_within(folder: Path, within: PurePosixPath) -> Path:
    """Raises:
    CheckpointError: if a link on the way leads out of ``folder``.
    """
    if not within.parts:
        return folder
    found = folder / within
    if found.exists() and not found.resolve().is_relative_to(folder.resolve()):
        raise CheckpointError(
            f"{found} is a link out of {folder}, of which nothing outside is read: give the folder it leads to itself"
        )
    return found
