"""Uploading adapters to the hub, and downloading them."""

from __future__ import annotations

import tempfile
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from ..files import hub
from .format import CARD_NAME, CONFIG_NAME, MODEL_CONFIG_NAME, SUBFOLDER, WEIGHTS_NAME
from .reading import holds_model
from .writing import check_not_foreign, save

_NAMES = (CONFIG_NAME, WEIGHTS_NAME, CARD_NAME)


def local_folder(source: str | PathLike[str], **options: Any) -> Path:
    """Return the local folder that holds the adapter files of a folder or hub repository.

    Options are those of :func:`~emma_adapter.files.hub.local_folder`.
    """
    patterns = [folder + name for folder in ("", f"{SUBFOLDER}/", f"{SUBFOLDER}/*/") for name in _NAMES]
    return hub.local_folder(source, patterns, **options)


def push(model: nn.Module, repo_id: str, *, private: bool | None, revision: str | None, **upload: Any) -> str:
    """Upload the active adapter and return the commit's address.

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
    """Return whether a repository holds a model, so that an adapter goes beside it, as in a local folder.

    Raises:
        FileExistsError: if it holds another tool's adapter.
    """
    with tempfile.TemporaryDirectory() as folder:
        configs = [CONFIG_NAME, MODEL_CONFIG_NAME]
        api.snapshot_download(repo_id, revision=revision, local_dir=folder, allow_patterns=configs)
        check_not_foreign(Path(folder), repo_id)
        return holds_model(Path(folder))
