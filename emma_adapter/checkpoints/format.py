"""The contents of an adapter folder, and the names of its files and tensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..alignment.config import RUN_TIME_FIELDS, EmmaConfig
from ..files.description import FolderFormat

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
CARD_NAME = "README.md"
#: Name of a model's config in transformers.
MODEL_CONFIG_NAME = "config.json"
#: Folder in which ``model.save_pretrained`` puts adapters, beside the base model or the LoRA.
SUBFOLDER = "emma_adapter"

FORMAT = FolderFormat(
    name="emma_adapter",
    version=1,
    config_name=CONFIG_NAME,
    weights_name=WEIGHTS_NAME,
    writer="adapter.save_pretrained",
    editable=RUN_TIME_FIELDS | {"instruction_encoder", "instruction_policy"},
)
ALIGNMENT_PREFIX = "alignment."
PROJECTOR_PREFIX = "projector."


@dataclass(frozen=True)
class SavedAdapter:
    """A checked adapter folder. ``projector`` is empty unless the projector was trained with the adapter."""

    source: Path
    config: EmmaConfig
    model_type: str
    alignment: dict[str, Tensor]
    projector: dict[str, Tensor]
    #: True if the instruction was found by a processor's chat template.
    reads_turns: bool
    #: False if the tensors aren't those that were saved; None before they are read.
    intact: bool | None
    #: Hub id or folder of the model it was trained on, if known.
    base_model: str | None
    #: Version of the library that wrote it, if known.
    library_version: str | None
