"""Folders of saved vision experts: ``vision_experts_config.json``, ``vision_experts.safetensors`` and a card.

No file has a name that transformers, PEFT or this library's other parts use, so that all of them may lie in one folder.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import BinaryIO

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
_CARD = (
    "---\nlibrary_name: emma_adapter\ntags: [emma, mixture-of-experts]\n---\n\n"
    "Vision experts for {model}:\n\n"
    "```python\nfrom emma_adapter import load_vision_experts\n\n"
    'experts = load_vision_experts(model, "path/to/this/folder")\n```\n'
)


def save(model: nn.Module, directory: str | PathLike[str], *, is_main_process: bool | None = None) -> None:
    """Write a model's experts, on rank 0 or where ``is_main_process`` says so; called by every process if FSDP has
    sharded them.

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
    tensor_folder.save(FORMAT, Path(directory), tensors, model.config, {"config": state.config.to_dict()}, _CARD)


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
