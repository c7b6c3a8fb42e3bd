"""To the hub, and from a folder or a hub id to a local folder."""

from __future__ import annotations

import glob
import tempfile
from os import PathLike
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from torch import nn

from ..errors import CheckpointError
from .format import CARD_NAME, CONFIG_NAME, MODEL_CONFIG_NAME, SUBFOLDER, WEIGHTS_NAME
from .reading import holds_model
from .writing import check_not_foreign, save

_NAMES = (CONFIG_NAME, WEIGHTS_NAME, CARD_NAME)


def is_local(source: str | PathLike[str]) -> bool:
    """Whether ``source`` is a folder here, and not the id of a repository on the hub."""
    return Path(source).is_dir()


def local_folder(
    source: str | PathLike[str],
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Path:
    """``source`` if it is a folder; else the downloaded adapter files of that hub repository. With ``subfolder``, that
    folder in it.

    Raises:
        CheckpointError: if it is neither, or if ``subfolder`` leads out of it.
    """
    within = _checked_subfolder(subfolder)
    if is_local(source):
        return _folder_within(Path(source), within)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            str(source),
            revision=revision,
            token=token,
            local_files_only=local_files_only,
            allow_patterns=[
                glob.escape(within.as_posix()) + f"/{folder}{name}" if within.parts else folder + name
                for folder in ("", f"{SUBFOLDER}/", f"{SUBFOLDER}/*/")
                for name in _NAMES
            ],
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


def push(model: nn.Module, repo_id: str, *, private: bool | None, revision: str | None, **upload: Any) -> str:
    """Upload the active adapter, and return the address of the commit.

    Raises:
        FileExistsError: if the repository holds another tool's adapter.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=upload.pop("token", None))
    with tempfile.TemporaryDirectory() as folder:
        adapter = Path(folder) / "upload" / SUBFOLDER
        save(model, adapter, location=repo_id)
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        if holds_a_model(api, repo_id, revision):
            # An earlier release put the adapter among the model's files.
            upload |= {"folder_path": adapter.parent, "delete_patterns": [CONFIG_NAME, WEIGHTS_NAME]}
        commit = api.upload_folder(repo_id=repo_id, revision=revision, **{"folder_path": adapter, **upload})
    return str(commit.commit_url)


def holds_a_model(api: Any, repo_id: str, revision: str | None) -> bool:
    """Whether a repository holds a model, beside which an adapter goes, as in a folder here.

    Raises:
        FileExistsError: if it holds another tool's adapter.
    """
    with tempfile.TemporaryDirectory() as folder:
        configs = [CONFIG_NAME, MODEL_CONFIG_NAME]
        api.snapshot_download(repo_id, revision=revision, local_dir=folder, allow_patterns=configs)
        check_not_foreign(Path(folder), repo_id)
        return holds_model(Path(folder))
