"""The arms of the comparison: what is trained on the frozen base model, and with which instruction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlavaProcessor

from emma_adapter import EmmaConfig, patch_model

from .vlm import BASE_DIR, TEXT_TOWER_DIR, PooledLlava


@dataclass
class Arm:
    """A model ready to train. ``parameters`` may be empty: then it is evaluated as it is."""

    name: str
    model: nn.Module
    parameters: list[nn.Parameter]
    learning_rate: float
    #: True for the control whose adapter is told the question of another scene, in training and in the test.
    shuffle_instructions: bool = False

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters)


LEARNING_RATES = {"linear": 1e-2, "attention": 6e-3, "modulation": 6e-3}

Builder = Callable[[PooledLlava, LlavaProcessor], Arm]


def base(model: PooledLlava, processor: LlavaProcessor) -> Arm:
    return Arm("base", model.requires_grad_(False), [], 0.0)


def emma(fusion: str, instruction_encoder: str = str(TEXT_TOWER_DIR), **changes: Any) -> Builder:
    """The adapter alone is trained."""

    def build(model: PooledLlava, processor: LlavaProcessor) -> Arm:
        config = EmmaConfig(fusion=fusion, instruction_encoder=instruction_encoder, **changes)
        adapter = patch_model(model, config, processor=processor).train_only()
        return Arm(f"EMMA, {fusion}", model, list(adapter.parameters()), LEARNING_RATES[fusion])

    return build


def shuffled(builder: Builder) -> Builder:
    """The control for "it is just more parameters": the same adapter, the wrong instructions."""

    def build(model: PooledLlava, processor: LlavaProcessor) -> Arm:
        arm = builder(model, processor)
        arm.name += ", shuffled instructions"
        arm.shuffle_instructions = True
        return arm

    return build


def lora(rank: int) -> Builder:
    """LoRA on every linear layer of the language model, through peft."""

    def build(model: PooledLlava, processor: LlavaProcessor) -> Arm:
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=r".*language_model.*_proj")
        wrapped = get_peft_model(model, config)
        trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
        return Arm(f"LoRA, rank {rank}", wrapped, trained, 3e-3)

    return build


def lora_of_size(model: PooledLlava, num_parameters: int) -> int:
    """The rank at which LoRA has about as many parameters."""
    layers = [
        layer
        for name, layer in model.model.language_model.named_modules()
        if isinstance(layer, nn.Linear) and name.endswith("_proj")
    ]
    per_rank = sum(layer.in_features + layer.out_features for layer in layers)
    return max(1, round(num_parameters / per_rank))


def load_base() -> PooledLlava:
    return PooledLlava.from_pretrained(BASE_DIR, dtype=torch.float32).eval()
