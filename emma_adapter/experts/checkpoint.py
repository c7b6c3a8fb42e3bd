"""Folders of saved vision experts: ``vision_experts_config.json``, ``vision_experts.safetensors`` and a card.

No file has a name that transformers, PEFT or this library's other parts use, so that all of them may lie in one folder.
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
from ..files.tensor_folder import FolderFormat, SavedFolder
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
    """Write a model's experts, on rank 0 or where ``is_main_process`` says so; called by every process if FSDP has
    sharded them. ``location`` is what the card tells to load.

    Raises:
        OSError: if the folder can't be written; what it held is intact.
        CheckpointError: if weights are NaN or infinite.
    """
    state = experts_state(model)
    named = state.module.state_dict(keep_vars=True)
    writes = sharding.is_main_process() if is_main_process is None else is_main_process
    # Every process takes part in gathering what is sharded.
    if not writes and not any(map(sharding.is_sharded, named.values())):
        return
    tensors = sharding.gather(model, named)
    if not writes:
        return
    told = {"config": state.config.to_dict()}
    tensor_folder.save(FORMAT, Path(directory), tensors, model.config, told, partial(_card, location=location))


def _card(told: Mapping[str, Any], location: str) -> str:
    return tensor_folder.make_card(
        told,
        "emma, mixture-of-experts",
        f"The vision experts {', '.join(told['config']['experts'])}, for",
        f'from emma_adapter import load_vision_experts\n\nexperts = load_vision_experts(model, "{location}")',
    )


def push(model: nn.Module, repo_id: str, **upload: Any) -> str:
    """Upload a model's experts, and return the address of the commit; see :func:`~..files.tensor_folder.push`."""

    def write(folder: Path) -> None:
        save(model, folder, is_main_process=True, location=repo_id)

    return tensor_folder.push(FORMAT, write, repo_id, **upload)


def describe(folder: Path) -> tuple[SavedFolder, VisionExpertsConfig, BinaryIO]:
    """Return what a folder says, its config, and its tensor file, open.

    Raises:
        CheckpointError: naming what is wrong with which file.
    """
    saved, file = tensor_folder.open_folder(FORMAT, folder)
    try:
        config = VisionExpertsConfig.from_dict(saved.written.get("config", {}))
    except (ConfigError, TypeError) as error:
        file.close()
        raise CheckpointError(f"{saved.config_path}: {error}; take another copy") from error
    return saved, config, file
