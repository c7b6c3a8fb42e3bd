"""What an adapter folder holds, and what its files and tensors are called."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..alignment.config import EmmaConfig

FORMAT_VERSION = 1
CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
CARD_NAME = "README.md"
#: What transformers calls a model's config.
MODEL_CONFIG_NAME = "config.json"
#: Where ``model.save_pretrained`` puts adapters, beside the base model or the LoRA.
SUBFOLDER = "emma_adapter"

#: What the config file, and the metadata of the tensor file, call the format and the config's key.
FORMAT = "emma_adapter"
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
    #: Hub id or folder of the model it was trained on, if that was known.
    base_model: str | None
    #: Of the library that wrote it, if it says so.
    library_version: str | None
