"""Freezing a model that draws, and its optimizer's parameter groups."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import ConfigError
from .state import unified_state


def train_only(model: nn.Module) -> None:
    """Freeze everything but the active branch."""
    state = unified_state(model)
    if state.trainable_before is None:
        state.trainable_before = {name: p.requires_grad for name, p in model.named_parameters()}
    model.requires_grad_(False)
    state.module.requires_grad_(True)


def unfreeze(model: nn.Module) -> None:
    """Make trainable again what :func:`train_only` has frozen."""
    state = unified_state(model)
    for name, parameter in model.named_parameters():
        if (state.trainable_before or {}).get(name):
            parameter.requires_grad_(True)
    for name, branch in state.branches.items():
        if name != state.active:
            branch.module.requires_grad_(False)
    state.trainable_before = None


def parameter_groups(model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Return groups for an optimizer: the active branch's matrices, and its vectors, which don't decay.

    Raises:
        ConfigError: if a rate is not a number, or negative.
    """
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
            raise ConfigError(f"{name} must be a number >= 0; got {value!r}")
    parameters = list(unified_state(model).module.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "lr": lr, "weight_decay": 0.0},
    ]
