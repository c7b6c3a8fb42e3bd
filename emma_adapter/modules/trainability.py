"""Which parameters of a model are trained, how that is restored, and the groups of an optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import ConfigError


def trainable_flags(model: nn.Module) -> dict[str, bool]:
    """Return which parameters of a model require gradients, by name."""
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def unfreeze(model: nn.Module, flags: Mapping[str, bool] | None) -> None:
    """Make those parameters trainable again that these flags say were; leave the others as they are."""
    for name, parameter in model.named_parameters():
        if (flags or {}).get(name):
            parameter.requires_grad_(True)


def is_trained(model: nn.Module) -> bool:
    """Return whether any parameter of a model requires gradients."""
    return any(parameter.requires_grad for parameter in model.parameters())


def check_rate(name: str, rate: Any) -> None:
    """Check that a learning rate or weight decay is one: optimizers don't check those of their groups.

    Raises:
        ConfigError: if it is neither a tensor nor a finite number >= 0.
    """
    if isinstance(rate, Tensor):
        return
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate < math.inf:
        raise ConfigError(f"{name} of parameter_groups must be a number >= 0; got {rate!r}")


def parameter_groups(parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Return an optimizer's groups of the trainable ones: matrices, which decay, and vectors, which don't."""
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "lr": lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
