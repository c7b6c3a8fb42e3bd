"""An adapter's own projector: a copy that is trained with the adapter, while the model's projector stays as it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class OwnProjector(nn.Module):
    """A copy of a projector, attached to that projector as the adapter is."""

    def __init__(self, projector: nn.Module) -> None:
        super().__init__()
        self.projector = projector
        self.training = projector.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Take the arguments of the model's projector, and return an output like that one's."""
        parameter = next(self.parameters(), None)
        # An offloaded projector moves its input itself.
        if parameter is not None and not parameter.is_meta and not torch.compiler.is_compiling():
            args = tuple(_to(value, parameter.device) for value in args)
            kwargs = {name: _to(value, parameter.device) for name, value in kwargs.items()}
        return self.projector(*args, **kwargs)


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
