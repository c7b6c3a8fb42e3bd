"""Uploads by ``push_to_hub`` of transformers and PEFT, and by Trainer: adapters are included."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from ..files.atomic import replace_files
from ..modules import private
from ..modules.method_guard import MethodGuard, arguments_by_name
from . import writing
from .beside_lora import tell_in_card
from .format import CARD_NAME, CONFIG_NAME, SUBFOLDER, WEIGHTS_NAME
from .reading import is_adapter


def install(model: nn.Module) -> None:
    """Guard the upload of a patched model, or of a ``PeftModel`` around one."""
    MethodGuard.install_once(model, private.UPLOAD, guard_upload)


def guard_upload(model: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Upload the saved folder in one commit, including nested folders."""
    arguments = arguments_by_name(original, args, kwargs)
    folder, repo_id = Path(arguments["working_dir"]), arguments["repo_id"]
    if not (folder / SUBFOLDER).is_dir():
        return original(*args, **kwargs)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    tell_in_card(model, folder, repo_id)
    earlier_timestamps = arguments.get("files_timestamps") or {}
    changed = [
        entry.name
        for entry in os.scandir(folder)
        if entry.name == SUBFOLDER
        or entry.name not in earlier_timestamps
        or entry.stat().st_mtime > earlier_timestamps[entry.name]
    ]
    api = HfApi(token=arguments.get("token"))
    revision, create_pr = arguments.get("revision"), arguments.get("create_pr", False)
    if revision is not None and not revision.startswith("refs/pr"):
        try:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        except HfHubHTTPError as error:
            # A user who may only open pull requests can't create the branch that one is for.
            if not create_pr or error.response.status_code != 403:
                raise
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        allow_patterns=[glob.escape(name) + end for name in changed for end in ("", "/*")],
        commit_message=arguments.get("commit_message") or "Upload model",
        commit_description=arguments.get("commit_description"),
        create_pr=create_pr,
        revision=revision,
    )


def complete(model: nn.Module, output: Path, step: int) -> None:
    """Copy the adapters of the checkpoint that Trainer is about to push into its output folder.

    Trainer pushes its output folder, and copies into it only those files of the checkpoint whose names it knows.

    Args:
        model: patched.
        output: Trainer's output folder.
        step: of the checkpoint.
    """
    name = f"checkpoint-{step}"
    # A hyperparameter search has a folder for each run.
    checkpoints = [folder for pattern in (name, f"*/{name}") for folder in output.glob(pattern) if folder.is_dir()]
    if not checkpoints:
        return
    checkpoint = max(checkpoints, key=os.path.getmtime)
    if is_adapter(checkpoint):
        _copy(checkpoint, output)
    elif (checkpoint / SUBFOLDER).is_dir():
        source, target = checkpoint / SUBFOLDER, output / SUBFOLDER
        for old in (target, *target.glob("*/")):
            if not is_adapter(source / old.relative_to(target)):
                writing.discard(old)
        for folder in (source, *source.glob("*/")):
            if is_adapter(folder):
                _copy(folder, target / folder.relative_to(source))
        if (checkpoint / CARD_NAME).is_file() and not (output / CARD_NAME).exists():
            replace_files(output, {CARD_NAME: (checkpoint / CARD_NAME).read_bytes()})
        tell_in_card(model, output)


def _copy(source: Path, target: Path) -> None:
    names = [WEIGHTS_NAME, CONFIG_NAME]
    if (source / CARD_NAME).is_file() and not (target / CARD_NAME).exists():
        names.append(CARD_NAME)
    replace_files(target, {name: (source / name).read_bytes() for name in names})
