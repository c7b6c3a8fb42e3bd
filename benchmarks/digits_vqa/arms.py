"""The arms of the comparison: what is trained on the frozen base model, and with which instruction."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlavaProcessor

from emma_adapter import EmmaConfig, patch_model

from .pooled_llava import PooledLlava
from .vlm import BASE_DIR, TEXT_TOWER_DIR


@dataclass
class Arm:
    """A model ready to train. ``parameters`` may be empty: then it is evaluated as it is."""

    name: str
    model: nn.Module
    parameters: list[nn.Parameter]
    learning_rate: float
    #: True for the control whose adapter is told the question of another scene, in training and in the test.
    shuffle_instructions: bool = False
    #: What the adapter is told by ``instruction=``, made of the question; None: what it reads off the prompt.
    instruction_template: str | None = None

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters)


LEARNING_RATES = {"linear": 1e-2, "attention": 6e-3, "modulation": 6e-3}

Builder = Callable[[PooledLlava, LlavaProcessor], Arm]


def base(model: PooledLlava, processor: LlavaProcessor) -> Arm:
    return Arm("base", model.requires_grad_(False), [], 0.0)


def projector_only(model: PooledLlava, processor: LlavaProcessor) -> Arm:
    trained = list(model.requires_grad_(False).model.multi_modal_projector.requires_grad_(True).parameters())
    return Arm("projector only", model, trained, 3e-3)


def emma(
    fusion: str, instruction_encoder: str = str(TEXT_TOWER_DIR), *, projector: bool = False, **changes: Any
) -> Builder:
    """The adapter alone is trained, or the projector with it."""
    return adapter(EmmaConfig(fusion=fusion, instruction_encoder=instruction_encoder, **changes), projector=projector)


def adapter(config: EmmaConfig, *, projector: bool = False) -> Builder:
    """An adapter of this config alone is trained, or the projector with it."""

    def build(model: PooledLlava, processor: LlavaProcessor) -> Arm:
        patch_model(model, config, processor=processor).train_only(projector=projector)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        name = f"EMMA, {config.fusion}" + (", and projector" if projector else "")
        return Arm(name, model, trained, LEARNING_RATES.get(config.fusion, 6e-3))

    return build


#: The question as it is: what the adapter would read off the prompt, which takes longer.
QUESTION = "{question}"


def instructed(builder: Builder, template: str = QUESTION) -> Builder:
    """The adapter is told this. A template without the question is the control for "any text helps"."""

    def build(model: PooledLlava, processor: LlavaProcessor) -> Arm:
        arm = builder(model, processor)
        arm.instruction_template = template
        return arm

    return build


def shuffled(builder: Builder) -> Builder:
    """The control for "it is just more parameters": the same adapter, the wrong instructions."""

    def build(model: PooledLlava, processor: LlavaProcessor) -> Arm:
        arm = builder(model, processor)
        arm.name += ", shuffled instructions"
        arm.shuffle_instructions, arm.instruction_template = True, QUESTION
        return arm

    return build


def together(adapter: Builder, lora: Builder) -> Builder:
    """Both are trained, at the lower of their rates: patched first, then wrapped by peft, which leaves the adapter
    trainable."""

    def build(model: PooledLlava, processor: LlavaProcessor) -> Arm:
        patched = adapter(model, processor)
        both = lora(model, processor)
        rate = min(patched.learning_rate, both.learning_rate)
        return replace(
            patched,
            name=f"{patched.name}, and {both.name}",
            model=both.model,
            parameters=both.parameters,
            learning_rate=rate,
        )

    return build


#: Which layers of the language model LoRA adapts.
ALL_LINEAR_LAYERS = r".*language_model.*_proj"
QUERIES_AND_VALUES = r".*language_model.*\.(q|v)_proj"


def lora(rank: int, layers: str = ALL_LINEAR_LAYERS, *, projector: bool = False) -> Builder:
    """LoRA on layers of the language model, through peft; with the projector, if asked for."""

    def build(model: PooledLlava, processor: LlavaProcessor) -> Arm:
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers)
        wrapped = get_peft_model(model, config)
        if projector:
            model.model.multi_modal_projector.requires_grad_(True)
        trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
        return Arm(f"LoRA, rank {rank}" + (", and projector" if projector else ""), wrapped, trained, 3e-3)

    return build


def lora_of_size(model: PooledLlava, num_parameters: int, layers: str = ALL_LINEAR_LAYERS) -> int:
    """The rank at which LoRA has about as many parameters."""
    adapted = [
        layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and re.fullmatch(layers, name)
    ]
    per_rank = sum(layer.in_features + layer.out_features for layer in adapted)
    return max(1, round(num_parameters / per_rank))


def load_base(folder: Path = BASE_DIR) -> PooledLlava:
    return PooledLlava.from_pretrained(folder, dtype=torch.float32).eval()
