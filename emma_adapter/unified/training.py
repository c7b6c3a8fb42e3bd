"""Freezing a model that draws, and its optimizer's parameter groups."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..modules import trainability
from .state import unified_state


def train_only(model: nn.Module) -> None:
    """Freeze everything but the active branch."""
    state = unified_state(model)
    if state.trainable_before is None:
        state.trainable_before = trainability.trainable_flags(model)
    model.requires_grad_(False)
    state.module.requires_grad_(True)


def unfreeze(model: nn.Module) -> None:
    """Make trainable again what :func:`train_only` has frozen."""
    state = unified_state(model)
    trainability.unfreeze(model, state.trainable_before)
    for name, branch in state.branches.items():
        if name != state.active:
            branch.module.requires_grad_(False)
    state.trainable_before = None


def parameter_groups(model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Return an optimizer's groups: the active branch's trainable matrices, and its vectors, which don't decay.

    Raises:
        ConfigError: if a rate is not a number, or negative.
    """
    for name, rate in (("lr", lr), ("weight_decay", weight_decay)):
        trainability.check_rate(name, rate)
    return trainability.parameter_groups(unified_state(model).module.parameters(), lr, weight_decay)
