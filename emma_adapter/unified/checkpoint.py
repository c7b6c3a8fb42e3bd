"""Folders of saved generation branches: ``unified_config.json``, ``unified_model.safetensors`` and a card.

The tensor file alone is complete, because its metadata repeats the config: replacing it is the moment at which a save
takes effect. Where the config file has another ``save_id``, a save was interrupted after that moment, and the metadata
is right. No file has a name that transformers, PEFT or this library's adapters of the first paper use, so that all of
them may lie in one folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError
from ..files import description
from ..files.atomic import replace_files
from ..files.hub import is_hub_id
from ..files.tensor_file import digest, read_header
from ..files.untrusted import open_regular
from ..messages import listed, shown
from ..modules import sharding
from ..version import __version__
from .config import UnifiedConfig
from .state import unified_state

CONFIG_NAME = "unified_config.json"
WEIGHTS_NAME = "unified_model.safetensors"
CARD_NAME = "README.md"
#: What the config file, and the metadata of the tensor file, call the format and the config's key.
FORMAT = "emma_unified"
FORMAT_VERSION = 1
#: Config fields that may be edited in a saved folder: they don't change what the weights compute.
_EDITABLE = frozenset({"noise_draws", "prompt_dropout", "changed_weight", "timestep_density", "time_shift"})


@dataclass(frozen=True)
class SavedUnified:
    """What the files of a folder say, before a weight is read."""

    source: Path
    config: UnifiedConfig
    model_type: str
    #: Hash of the autoencoder's config, and its hub id or folder if it had one.
    autoencoder: str
    autoencoder_source: str | None
    sha256: str
    #: On the meta device.
    tensors: dict[str, Tensor]


def save(
    model: nn.Module,
    directory: str | PathLike[str],
    *,
    is_main_process: bool | None = None,
    location: str = "path/to/this/folder",
) -> None:
    """Write a generation branch, on rank 0 or where ``is_main_process`` says so.

    Tensors go from where they are to the file; only what is on another device than the CPU is in memory once more.
    ``location`` is what the card tells to load.

    Raises:
        OSError: if the folder can't be written; what it held is intact.
        CheckpointError: if weights are NaN or infinite.
    """
    if not (sharding.is_main_process() if is_main_process is None else is_main_process):
        return
    folder = Path(directory)
    state = unified_state(model)
    tensors = sharding.gather(model, state.module.state_dict(keep_vars=True))
    if broken := sorted(name for name, value in tensors.items() if not bool(torch.isfinite(value).all())):
        raise CheckpointError(
            f"{listed(broken)} hold NaN or infinite values, so that {folder} was left as it is: the training diverged; "
            "go on from an earlier checkpoint, with a lower learning rate, or in float32 or bfloat16"
        )
    base: Any = model.config
    told = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "library_version": __version__,
        "save_id": uuid.uuid4().hex,
        "sha256": digest(tensors),
        "base_model_name_or_path": getattr(base, "name_or_path", "") or None,
        "model_type": base.model_type,
        "autoencoder": {"source": state.coder.source, "config_sha256": state.coder.fingerprint()},
        "config": state.config.to_dict(),
    }
    metadata = {"format": "pt", FORMAT: json.dumps(told, sort_keys=True)}
    files: dict[str, Any] = {
        WEIGHTS_NAME: lambda path: save_file(tensors, path, metadata),
        CONFIG_NAME: (json.dumps(told, indent=2, sort_keys=True) + "\n").encode(),
    }
    if not os.path.lexists(folder / CARD_NAME):
        files[CARD_NAME] = _card(told, location).encode()
    replace_files(folder, files)


def _card(told: Mapping[str, Any], location: str) -> str:
    base = told["base_model_name_or_path"] or "the model that it was trained on"
    autoencoder = told["autoencoder"]["source"]
    given = "" if autoencoder is not None and is_hub_id(autoencoder) else ", autoencoder=autoencoder"
    # The hub takes no other name than one of its own.
    base_line = f"base_model: {base}\nbase_model_relation: adapter\n" if is_hub_id(base) else ""
    return (
        f"---\nlibrary_name: emma_adapter\n{base_line}tags: [emma, text-to-image, image-editing]\n---\n\n"
        f"Lets `{base}` ({told['model_type']}) draw and edit pictures:\n\n"
        "```python\nfrom emma_adapter import load_unified\n\n"
        f'unified = load_unified(model, "{location}", processor=processor{given})\n'
        'unified.generate_images("a red five").images\n```\n\n'
        f"Trained with the autoencoder {f'`{autoencoder}`' if autoencoder else 'that its author gave as a module'}.\n"
    )


def push(model: nn.Module, repo_id: str, *, private: bool | None, revision: str | None, **upload: Any) -> str:
    """Upload a generation branch, and return the address of the commit. Whatever else is there stays, the card too."""
    from huggingface_hub import HfApi

    api = HfApi(token=upload.pop("token", None))
    with tempfile.TemporaryDirectory() as folder:
        save(model, folder, is_main_process=True, location=repo_id)
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        own = [] if api.file_exists(repo_id, CARD_NAME, revision=revision) else [CARD_NAME]
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            allow_patterns=[CONFIG_NAME, WEIGHTS_NAME, *own],
            **upload,
        )
    return str(commit.commit_url)


def describe(folder: Path) -> tuple[SavedUnified, BinaryIO]:
    """Return what a folder says, and its tensor file, open for :func:`read_into`.

    Raises:
        CheckpointError: naming what is wrong with which file.
    """
    written = _read_config(folder / CONFIG_NAME, folder)
    path = folder / WEIGHTS_NAME
    try:
        file = open_regular(path, folder)
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no {WEIGHTS_NAME} in {folder}: copy the whole folder") from error
    try:
        tensors, metadata = read_header(file, path)
        if not isinstance(metadata.get(FORMAT), str):
            raise CheckpointError(
                f"{path} was not written by unified.save_pretrained: its metadata lacks {FORMAT!r}; take another copy"
            )
        embedded = _parse(metadata[FORMAT], path)
        if embedded.get("save_id") != written.get("save_id"):
            # Interrupted between the two replacements: the tensor file is the newer one.
            written = embedded
        if edited := description.edited_fields(written.get("config"), embedded.get("config"), _EDITABLE):
            raise CheckpointError(
                f"{folder / CONFIG_NAME} was changed since it was saved, in {listed(edited)}: the weights were made "
                "for the config they were saved with; undo the changes, or train anew"
            )
        description.check_version(written, folder / CONFIG_NAME, FORMAT_VERSION)
        return _described(written, tensors, folder), file
    except BaseException:
        file.close()
        raise


def _described(written: Mapping[str, Any], tensors: dict[str, Tensor], folder: Path) -> SavedUnified:
    path = folder / CONFIG_NAME
    try:
        config = UnifiedConfig.from_dict(written.get("config", {}))
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}; take another copy") from error
    autoencoder = written.get("autoencoder")
    values = {
        "model_type": written.get("model_type"),
        "sha256": written.get("sha256"),
        "autoencoder.config_sha256": autoencoder.get("config_sha256") if isinstance(autoencoder, dict) else None,
    }
    for name, value in values.items():
        if not isinstance(value, str):
            raise CheckpointError(f"{path}: {name} should be a text and is {shown(value)}; take another copy")
    source = autoencoder.get("source") if isinstance(autoencoder, dict) else None
    return SavedUnified(
        source=folder,
        config=config,
        model_type=str(values["model_type"]),
        autoencoder=str(values["autoencoder.config_sha256"]),
        autoencoder_source=source if isinstance(source, str) else None,
        sha256=str(values["sha256"]),
        tensors=tensors,
    )


def check_fits(saved: SavedUnified, expected: Mapping[str, Tensor]) -> None:
    """Check that saved tensors are those of a branch, by names, shapes and kinds, before any is read.

    Raises:
        CheckpointError: naming those that aren't.
    """
    found = saved.tensors
    problems = []
    if missing := sorted(set(expected) - set(found)):
        problems.append(f"missing tensor(s) {listed(missing)}")
    if unexpected := sorted(set(found) - set(expected)):
        problems.append(f"unexpected tensor(s) {listed(unexpected)}")
    for name in sorted(set(found) & set(expected)):
        if found[name].shape != expected[name].shape:
            problems.append(f"{name} is {list(found[name].shape)} and should be {list(expected[name].shape)}")
        elif not found[name].is_floating_point() or found[name].itemsize == 1:
            problems.append(f"{name} is {found[name].dtype} and should be a float of 16 bits or more")
    if problems:
        raise CheckpointError(
            f"{saved.source / WEIGHTS_NAME} doesn't fit its config or the model: {'; '.join(problems[:4])}. Load it "
            "into the model it was made for, or take another copy"
        )


def read_into(saved: SavedUnified, file: BinaryIO, expected: Mapping[str, Tensor]) -> None:
    """Give a branch the values of a file, one tensor after another, so that no second copy of all is in memory.

    Args:
        saved: what :func:`describe` returned.
        file: likewise.
        expected: the branch's own tensors, by name.

    Raises:
        CheckpointError: if values aren't finite, or not those that were saved.
    """
    path = saved.source / WEIGHTS_NAME
    offsets = _offsets(file, path)
    found = hashlib.sha256()
    for name in sorted(saved.tensors):
        described = saved.tensors[name]
        content = torch.empty(described.shape, dtype=described.dtype)
        file.seek(offsets[name])
        if content.numel():
            buffer = content.view(-1).view(torch.uint8).numpy()
            if file.readinto(buffer) != len(buffer):  # type: ignore[attr-defined]
                raise CheckpointError(f"{path} became shorter while it was read: take another copy")
            found.update(f"{name} {content.dtype} {list(content.shape)};".encode())
            found.update(buffer.data)
        if not bool(torch.isfinite(content.to(expected[name].dtype)).all()):
            raise CheckpointError(
                f"{path}: {name} holds NaN or infinite values, in {expected[name].dtype}; take another copy, or load "
                "it into a model in the dtype it was trained in"
            )
        with torch.no_grad():
            expected[name].copy_(content)
    if found.hexdigest() != saved.sha256:
        raise CheckpointError(
            f"the tensors in {path} are not those that were saved (their SHA-256 differs): take another copy"
        )


def _offsets(file: BinaryIO, path: Path) -> dict[str, int]:
    """Where each tensor begins. The header was checked by ``read_header``, but for tensors that overlap."""
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    end = 0
    for start, stop in sorted(tuple(entry["data_offsets"]) for entry in header.values()):
        if start != end:
            raise CheckpointError(
                f"{path} is not a valid safetensors file: tensors overlap or leave gaps; take another copy"
            )
        end = stop
    return {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items()}


def _read_config(path: Path, folder: Path) -> dict[str, Any]:
    return _parse(description.read_text(path, folder, writer="unified.save_pretrained"), path)


def _parse(text: str, path: Path) -> dict[str, Any]:
    described = description.parse(text, path)
    if not isinstance(described, dict) or described.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} doesn't describe what unified.save_pretrained writes: load it with the tool that wrote it"
        )
    return described
