"""Folders of one config file, one tensor file and a card, in which adapters, branches and vision experts are saved."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError, DataError
from ..messages import listed, shown
from . import description
from .atomic import replace_files
from .description import FolderFormat
from .hub import is_hub_id
from .tensor_file import read_header
from .untrusted import open_regular

CARD_NAME = "README.md"


@dataclass(frozen=True)
class SavedFolder:
    """A folder's description and its tensors' shapes and dtypes, before any weight is read."""

    kind: FolderFormat
    source: Path
    #: The whole description; its ``config`` isn't checked yet.
    written: Mapping[str, Any]
    sha256: str
    model_type: str
    #: On the meta device.
    tensors: dict[str, Tensor]

    @property
    def weights_path(self) -> Path:
        return self.source / self.kind.weights_name

    @property
    def config_path(self) -> Path:
        return self.source / self.kind.config_name

    def text(self, name: str, value: object) -> str:
        """Return a value of the description, checked to be a text.

        Raises:
            CheckpointError: if it isn't.
        """
        if not isinstance(value, str):
            raise CheckpointError(
                f"{self.config_path}: {name} should be a text and is {shown(value)}; download or copy it again"
            )
        return value


def save(
    kind: FolderFormat,
    folder: Path,
    tensors: Mapping[str, Tensor],
    base: Any,
    entries: Mapping[str, Any],
    card: Callable[[Mapping[str, Any]], str],
    beside_card: Mapping[str, bytes] | None = None,
) -> None:
    """Write a folder, atomically.

    Args:
        kind: of folder.
        folder: made if it isn't there.
        tensors: contiguous, on the CPU.
        base: config of the model that they are for.
        entries: further entries of the description, ``config`` among them.
        card: makes the card from the description; called unless there is a card.
        beside_card: files that the card shows, by name. They are refused if there is a card, which wouldn't show them.

    Raises:
        OSError: if the folder can't be written; its former contents are intact.
        CheckpointError: if weights are NaN or infinite.
        DataError: if files beside a card are refused.
    """
    has_card = os.path.lexists(folder / CARD_NAME)
    if has_card and beside_card:
        raise DataError(
            f"{folder / CARD_NAME} is there already, and a card that is there is left as it is: samples go into a new "
            "one. Remove it, or save elsewhere"
        )
    check_finite(tensors, folder)
    described = description.describe(kind, base, tensors, entries)
    metadata, config = description.encoded(kind, described)
    files: dict[str, Any] = {
        kind.weights_name: lambda path: save_file(dict(tensors), path, metadata),
        kind.config_name: config,
    }
    if not has_card:
        files |= {**(beside_card or {}), CARD_NAME: card(described).encode()}
    replace_files(folder, files)


def check_finite(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Check that no tensor holds values that would be refused when it is loaded.

    Raises:
        CheckpointError: naming tensors with NaN or infinite values.
    """
    if nonfinite_names := sorted(name for name, value in tensors.items() if not bool(torch.isfinite(value).all())):
        raise CheckpointError(
            f"{listed(nonfinite_names)} hold NaN or infinite values, so that {folder} was left as it is: the training "
            "diverged; go on from an earlier checkpoint, with a lower learning rate, or in float32 or bfloat16 if it "
            "was in float16"
        )


def make_card(described: Mapping[str, Any], tags: str, what: str, code: str, more: str = "", metadata: str = "") -> str:
    """Return a card for the hub.

    Args:
        described: the description.
        tags: for the hub, separated by commas.
        what: the words before the name of the base model.
        code: an example that loads and uses the folder.
        more: sentences after the code.
        metadata: further lines of YAML.
    """
    base = described["base_model_name_or_path"] or "the model that it was trained on"
    # The hub refuses a base_model that isn't a hub id.
    base_line = f"base_model: {base}\nbase_model_relation: adapter\n" if is_hub_id(base) else ""
    return (
        f"---\nlibrary_name: emma_adapter\n{base_line}tags: [{tags}]\n{metadata}---\n\n"
        f"{what} `{base}` ({described['model_type']}):\n\n```python\n{code}\n```\n" + (more and f"\n{more}\n")
    )


def push(
    kind: FolderFormat,
    write: Callable[[Path], None],
    repo_id: str,
    *,
    private: bool | None,
    revision: str | None,
    **upload: Any,
) -> str:
    """Upload what ``write`` writes to a folder, and return the commit's address.

    Other files of the repository stay, its card too, so that files that a new card would show are refused.

    Raises:
        DataError: if files are refused.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=upload.pop("token", None))
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        has_card = api.file_exists(repo_id, CARD_NAME, revision=revision)
        beside_card = sorted({*os.listdir(folder)} - {kind.config_name, kind.weights_name, CARD_NAME})
        if has_card and beside_card:
            raise DataError(
                f"{repo_id} has a card, which is left as it is and would not tell of samples: add them to it by hand, "
                "or push without"
            )
        card_files = [] if has_card else [CARD_NAME, *beside_card]
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            allow_patterns=[kind.config_name, kind.weights_name, *card_files],
            **upload,
        )
    return str(commit.commit_url)


def open_folder(kind: FolderFormat, folder: Path, root: Path | None = None) -> tuple[SavedFolder, BinaryIO]:
    """Return a folder's description, and its tensor file, open for :func:`read_into`.

    It is opened only once, so that what is loaded is what was checked, even if a save replaces it meanwhile.

    Args:
        kind: of folder.
        folder: to read.
        root: the folder that links must not lead out of; default: ``folder``.

    Raises:
        CheckpointError: naming the file and what is wrong with it.
    """
    root = folder if root is None else root
    config_path, path = folder / kind.config_name, folder / kind.weights_name
    written = description.read(kind, folder, root)
    # A newer format may keep its tensors elsewhere.
    description.check_version(written, config_path, kind.version)
    try:
        file = open_regular(path, root)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"there is no {path.name} in {folder}: the weights are missing; copy the whole folder"
        ) from error
    try:
        tensors, metadata = read_header(file, path)
        if not isinstance(metadata.get(kind.name), str):
            raise CheckpointError(
                f"{path} was not written by emma_adapter's {kind.writer}: its metadata lacks {kind.name!r}; download "
                "or copy it again"
            )
        embedded = description.parse(kind, metadata[kind.name], path)
        written = description.of_tensors(kind, written, embedded, folder)
        description.check_version(written, config_path, kind.version)
        saved = SavedFolder(kind, folder, written, "", "", tensors)
        texts = {name: saved.text(name, written.get(name)) for name in ("sha256", "model_type")}
        return SavedFolder(kind, folder, written, texts["sha256"], texts["model_type"], tensors), file
    except BaseException:
        file.close()
        raise


def check_model_type(saved: SavedFolder, model_type: object) -> None:
    """Check that a folder was made for a model of this type.

    Raises:
        CheckpointError: if it wasn't.
    """
    if model_type != saved.model_type:
        raise CheckpointError(
            f"{saved.source} was made for a model of type {saved.model_type!r}, and this one is {model_type!r}: "
            "load it into the model it was made for"
        )


def check_fits(saved: SavedFolder, expected: Mapping[str, Tensor]) -> None:
    """Check that saved tensors have the names, shapes and kinds that are expected, before any is read.

    Raises:
        CheckpointError: naming those that don't.
    """
    tensors = saved.tensors
    problems = []
    if missing := sorted(set(expected) - set(tensors)):
        problems.append(f"missing tensor(s) {listed(missing)}")
    if unexpected := sorted(set(tensors) - set(expected)):
        problems.append(f"unexpected tensor(s) {listed(unexpected)}")
    for name in sorted(set(tensors) & set(expected)):
        if tensors[name].shape != expected[name].shape:
            problems.append(f"{name} is {list(tensors[name].shape)} and should be {list(expected[name].shape)}")
        elif not tensors[name].is_floating_point() or tensors[name].itemsize == 1:
            problems.append(f"{name} is {tensors[name].dtype} and should be a float of 16 bits or more")
    if problems:
        raise CheckpointError(
            f"{saved.weights_path} doesn't fit its config or the model: {'; '.join(problems[:4])}. Load it "
            "into the model it was made for, or download or copy it again"
        )


def read_into(saved: SavedFolder, file: BinaryIO, expected: Mapping[str, Tensor]) -> None:
    """Copy a file's values into tensors, one after another, so that memory never holds a second copy of all.

    Args:
        saved: from :func:`open_folder`.
        file: likewise.
        expected: the tensors to fill, by name.

    Raises:
        CheckpointError: if values aren't finite, or aren't those that were saved.
    """
    path = saved.weights_path
    offsets = _offsets(file, path)
    checksum = hashlib.sha256()
    for name in sorted(saved.tensors):
        saved_tensor = saved.tensors[name]
        content = torch.empty(saved_tensor.shape, dtype=saved_tensor.dtype)
        file.seek(offsets[name])
        if content.numel():
            buffer = content.view(-1).view(torch.uint8).numpy()
            if file.readinto(buffer) != len(buffer):  # type: ignore[attr-defined]
                raise CheckpointError(f"{path} became shorter while it was read: download or copy it again")
            checksum.update(f"{name} {content.dtype} {list(content.shape)};".encode())
            checksum.update(buffer.data)
        if not bool(torch.isfinite(content.to(expected[name].dtype)).all()):
            raise CheckpointError(
                f"{path}: {name} holds NaN or infinite values, in {expected[name].dtype}; download or copy it again, "
                "or load it into a model in the dtype it was trained in"
            )
        with torch.no_grad():
            expected[name].copy_(content)
    if checksum.hexdigest() != saved.sha256:
        raise CheckpointError(
            f"the tensors in {path} are not those that were saved (their SHA-256 differs): download or copy it again"
        )


def _offsets(file: BinaryIO, path: Path) -> dict[str, int]:
    """Return the byte at which each tensor begins, by name.

    ``read_header`` has checked the header, except for overlapping tensors.
    """
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    end = 0
    for start, stop in sorted(tuple(entry["data_offsets"]) for entry in header.values()):
        if start != end:
            raise CheckpointError(
                f"{path} is not a valid safetensors file: tensors overlap or leave gaps; download or copy it again"
            )
        end = stop
    return {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items()}
