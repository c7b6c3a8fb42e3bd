"""Folders of saved vision experts: ``vision_experts_config.json``, ``vision_experts.safetensors`` and a card.

No file has a name that transformers, PEFT or this library's other parts use, so that one folder can hold all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO

from torch import nn

from ..errors import CheckpointError, ConfigError
from ..files import tensor_folder
from ..files.description import FolderFormat
from ..files.tensor_folder import SavedFolder
from ..modules import sharding
from .config import VisionExpertsConfig
from .state import experts_state

CONFIG_NAME = "vision_experts_config.json"
WEIGHTS_NAME = "vision_experts.safetensors"
FORMAT = FolderFormat(
    name="emma_vision_experts",
    version=1,
    config_name=CONFIG_NAME,
    weights_name=WEIGHTS_NAME,
    writer="experts.save_pretrained",
    editable=frozenset({"margin"}),
)


def save(
    model: nn.Module,
    directory: str | PathLike[str],
    *,
    is_main_process: bool | None = None,
    location: str = "path/to/this/folder",
) -> None:
    """Write a model's experts, on rank 0 or where ``is_main_process`` says so.

    Every process must call it if FSDP has sharded them. ``location`` is the folder or hub id in the card's example.

    Raises:
        OSError: if the folder can't be written; its former contents are intact.
        CheckpointError: if weights are NaN or infinite.
    """
    state = experts_state(model)
    parameters = state.module.state_dict(keep_vars=True)
    writes = sharding.is_main_process() if is_main_process is None else is_main_process
    # Every process takes part in gathering what is sharded.
    if not writes and not any(map(sharding.is_sharded, parameters.values())):
        return
    tensors = sharding.gather(model, parameters)
    if not writes:
        return
    description = {"config": state.config.to_dict()}
    tensor_folder.save(FORMAT, Path(directory), tensors, model.config, description, partial(_card, location=location))


def _card(description: Mapping[str, Any], location: str) -> str:
    return tensor_folder.make_card(
        description,
        "emma, mixture-of-experts",
        f"The vision experts {', '.join(description['config']['experts'])}, for",
        f'from emma_adapter import load_vision_experts\n\nexperts = load_vision_experts(model, "{location}")',
    )


def push(model: nn.Module, repo_id: str, **upload: Any) -> str:
    """Upload a model's experts and return the commit's address; see :func:`~..files.tensor_folder.push`."""

    def write(folder: Path) -> None:
        save(model, folder, is_main_process=True, location=repo_id)

    return tensor_folder.push(FORMAT, write, repo_id, **upload)


def describe(folder: Path) -> tuple[SavedFolder, VisionExpertsConfig, BinaryIO]:
    """Return a folder's description, its config, and its open tensor file.

    Raises:
        CheckpointError: naming the file and what is wrong with it.
    """
    saved, file = tensor_folder.open_folder(FORMAT, folder)
    try:
        config = VisionExpertsConfig.from_dict(saved.written.get("config", {}))
    except (ConfigError, TypeError) as error:
        file.close()
        raise CheckpointError(f"{saved.config_path}: {error}; download or copy it again") from error
    return saved, config, file
