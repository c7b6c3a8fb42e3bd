"""What is trained on the model, one after the other: each leaves it as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click
from peft import LoraConfig, get_peft_model
from torch import nn

from benchmarks.digits_vqa.ablation.recipes import LINEAR_PARTS
from emma_adapter import EmmaConfig, UnsupportedModelError, patch_model, unpatch_model


def names(fusion: str) -> list[str]:
    """The adapter, LoRA of its size, and the parts of ``linear``."""
    return list(dict.fromkeys([fusion, "LoRA", "linear", *LINEAR_PARTS]))


@contextmanager
def adapter(model: nn.Module, processor: Any, fusion: str, instruction_encoder: str) -> Iterator[Any]:
    """The model with an adapter that alone is trained.

    Raises:
        click.ClickException: if the model can't have it.
    """
    config = EmmaConfig(fusion=fusion)
    try:
        handle = patch_model(model, config, processor=processor, instruction_encoder=instruction_encoder)
    except UnsupportedModelError as error:
        raise click.ClickException(str(error)) from error
    try:
        yield handle.train_only()
    finally:
        unpatch_model(model)


@contextmanager
def lora(model: nn.Module, num_parameters: int) -> Iterator[nn.Module]:
    """LoRA on queries and values of the language model, with the rank that comes nearest to so many parameters."""
    found = query_and_value_layers(model)
    per_rank = sum(layer.in_features + layer.out_features for layer in found.values())
    rank = max(1, round(num_parameters / per_rank))
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    wrapped = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(found)))
    try:
        yield wrapped
    finally:
        wrapped.unload()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name])


def query_and_value_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """By their names in the model.

    Raises:
        click.ClickException: if the language model has none that are called as usual.
    """
    decoder = model.get_decoder()  # type: ignore[operator]
    members = {id(module) for module in decoder.modules()}
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module) in members and name.endswith((".q_proj", ".v_proj"))
    }
    if not found:
        raise click.ClickException(
            f"the language model of this {type(model).__name__} has no layers called q_proj and v_proj, to which LoRA "
            "could be added as the control; choose a model that has"
        )
    return found
