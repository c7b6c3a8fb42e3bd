"""An adapter's own projector: a copy of the model's that is trained with the adapter, while the model's stays."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class OwnProjector(nn.Module):
    """Stands beside the projector it is a copy of, as the adapter does."""

    def __init__(self, projector: nn.Module) -> None:
        super().__init__()
        self.projector = projector
        self.training = projector.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Take what the model's projector takes, and return what it returns."""
        parameter = next(self.parameters(), None)
        # What is offloaded moves its input itself.
        if parameter is not None and not parameter.is_meta and not torch.compiler.is_compiling():
            args = tuple(_to(value, parameter.device) for value in args)
            kwargs = {name: _to(value, parameter.device) for name, value in kwargs.items()}
        return self.projector(*args, **kwargs)


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
