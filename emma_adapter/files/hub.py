"""Local folders with the files of a folder or of a hub repository."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable
from os import PathLike
from pathlib import Path, PurePosixPath, PureWindowsPath

from ..errors import CheckpointError


def is_local(source: str | PathLike[str]) -> bool:
    """Return whether ``source`` is a local folder, rather than the id of a hub repository."""
    return Path(source).is_dir()


def is_hub_id(source: str) -> bool:
    """Return whether a name can only mean a hub repository, and nothing on this machine."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(source)
    except HFValidationError:
        return False
    # transformers and diffusers prefer a folder of that name.
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
    """Return ``source`` if it is a folder; else the folder of that hub repository's files, downloaded if need be.

    With ``subfolder``, return that folder in it.

    Args:
        source: a folder, or a hub id.
        patterns: of the files to download, relative to ``subfolder``.
        revision: branch, tag or commit on the hub.
        subfolder: a relative path downwards.
        token: of the hub; None and True: the stored one; False: none.
        local_files_only: don't ask the hub; use what was downloaded before.

    Raises:
        CheckpointError: if ``source`` is neither, or if ``subfolder`` leads out of it.
    """
    within = _checked_subfolder(subfolder)
    if is_local(source):
        return _folder_within(Path(source), within)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    prefix = glob.escape(within.as_posix()) + "/" if within.parts else ""
    try:
        folder = snapshot_download(
            str(source),
            revision=revision,
            token=token,
            local_files_only=local_files_only,
            allow_patterns=[prefix + pattern for pattern in patterns],
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{source} is neither a folder here nor an adapter that the hub gives: check the path, or the name and "
            f"whether it was downloaded before; a private one needs token=, or hf auth login ({error})"
        ) from error
    return _folder_within(Path(folder), within)


def _checked_subfolder(subfolder: str | None) -> PurePosixPath:
    """Return the path of a subfolder.

    Raises:
        CheckpointError: if it doesn't lead downwards.
    """
    within = PurePosixPath((subfolder or "").replace("\\", "/"))
    if within.is_absolute() or PureWindowsPath(within).drive or ".." in within.parts:
        raise CheckpointError(
            f"subfolder={subfolder!r} leads out of the folder or repository, of which nothing outside is read: name "
            'one that is in it, as "last-checkpoint"'
        )
    return within


def _folder_within(folder: Path, within: PurePosixPath) -> Path:
    """Return the folder at the path ``within`` a folder.

    Raises:
        CheckpointError: if a link on the way leads out of ``folder``.
    """
    if not within.parts:
        return folder
    inner = folder / within
    if inner.exists() and not inner.resolve().is_relative_to(folder.resolve()):
        raise CheckpointError(
            f"{inner} is a link out of {folder}, of which nothing outside is read: give the folder that it leads to"
        )
    return inner
