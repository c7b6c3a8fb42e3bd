"""Folders of saved generation branches: ``unified_config.json``, ``unified_model.safetensors`` and a card.

No file has a name that transformers, PEFT or this library's other parts use, so that one folder can hold all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO

from torch import nn

from ..errors import CheckpointError, ConfigError
from ..files import tensor_folder
from ..files.description import FolderFormat
from ..files.hub import is_hub_id
from ..files.tensor_folder import SavedFolder
from ..modules import sharding
from .config import UnifiedConfig
from .samples import Samples, card_metadata, sample_files
from .state import MODULE_NAME, unified_state

CONFIG_NAME = "unified_config.json"
WEIGHTS_NAME = "unified_model.safetensors"
FORMAT = FolderFormat(
    name="emma_unified",
    version=1,
    config_name=CONFIG_NAME,
    weights_name=WEIGHTS_NAME,
    writer="unified.save_pretrained",
    editable=frozenset({"noise_draws", "prompt_dropout", "changed_weight", "timestep_density", "time_shift"}),
)


@dataclass(frozen=True)
class SavedUnified:
    """The contents of a folder except for its weights."""

    folder: SavedFolder
    config: UnifiedConfig
    #: Hash of the autoencoder's config, and its hub id or folder if it had one.
    autoencoder: str
    autoencoder_source: str | None


def save(
    model: nn.Module,
    directory: str | PathLike[str],
    *,
    is_main_process: bool | None = None,
    location: str = "path/to/this/folder",
    name: str | None = None,
    samples: Samples = (),
) -> None:
    """Write a generation branch, on rank 0 or where ``is_main_process`` says so. Default: the active one.

    Tensors are written from where they are; only those on another device than the CPU take up memory a second time.
    ``location`` is the folder or hub id in the card's example, ``samples`` are the pictures that the card shows.

    Raises:
        OSError: if the folder can't be written; its former contents are intact.
        CheckpointError: if weights are NaN or infinite.
        DataError: if samples aren't prompts and pictures, or there is a card already.
    """
    if not (sharding.is_main_process() if is_main_process is None else is_main_process):
        return
    state = unified_state(model)
    branch = state.branches[state.active if name is None else name]
    pictures = sample_files(samples)
    tensors = sharding.gather(model, branch.module.state_dict(keep_vars=True))
    description = {
        "autoencoder": {"source": branch.coder.source, "config_sha256": branch.coder.fingerprint()},
        "config": branch.config.to_dict(),
    }
    card = partial(_card, location=location, samples=samples)
    tensor_folder.save(FORMAT, Path(directory), tensors, model.config, description, card, pictures)


def save_all(model: nn.Module, directory: str | PathLike[str], *, is_main_process: bool | None = None) -> None:
    """Write the active branch to a folder, and every other one to ``emma_unified/<name>`` in it; see :func:`save`."""
    save(model, directory, is_main_process=is_main_process)
    state = unified_state(model)
    for name in set(state.branches) - {state.active}:
        save(model, Path(directory) / MODULE_NAME / name, is_main_process=is_main_process, name=name)


def _card(description: Mapping[str, Any], location: str, samples: Samples) -> str:
    autoencoder = description["autoencoder"]["source"]
    argument = "" if autoencoder is not None and is_hub_id(autoencoder) else ", autoencoder=autoencoder"
    return tensor_folder.make_card(
        description,
        "emma, text-to-image, image-editing",
        "A branch for drawing and editing pictures, of",
        "from emma_adapter import load_unified\n\n"
        f'unified = load_unified(model, "{location}", processor=processor{argument})\n'
        'unified.generate_images("a red five").images',
        f"Trained with the autoencoder {f'`{autoencoder}`' if autoencoder else 'that its author gave as a module'}."
        + ("\n\n<Gallery />" if samples else ""),
        card_metadata(samples),
    )


def push(model: nn.Module, repo_id: str, *, samples: Samples = (), **upload: Any) -> str:
    """Upload a generation branch and return the commit's address; see :func:`~..files.tensor_folder.push`."""

    def write(folder: Path) -> None:
        save(model, folder, is_main_process=True, location=repo_id, samples=samples)

    return tensor_folder.push(FORMAT, write, repo_id, **upload)


def describe(folder: Path) -> tuple[SavedUnified, BinaryIO]:
    """Return a folder's description and its open tensor file.

    Raises:
        CheckpointError: naming the file and what is wrong with it.
    """
    saved, file = tensor_folder.open_folder(FORMAT, folder)
    try:
        return _described(saved), file
    except BaseException:
        file.close()
        raise


def _described(saved: SavedFolder) -> SavedUnified:
    try:
        config = UnifiedConfig.from_dict(saved.written.get("config", {}))
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{saved.config_path}: {error}; download or copy it again") from error
    autoencoder = saved.written.get("autoencoder")
    autoencoder = autoencoder if isinstance(autoencoder, dict) else {}
    source = autoencoder.get("source")
    return SavedUnified(
        folder=saved,
        config=config,
        autoencoder=saved.text("autoencoder.config_sha256", autoencoder.get("config_sha256")),
        autoencoder_source=source if isinstance(source, str) else None,
    )
