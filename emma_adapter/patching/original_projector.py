"""A projector as it was before it was trained with an adapter."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_placing = threading.Lock()


class OriginalProjector(nn.Module):
    """Holds a copy of a projector from before training.

    It is a submodule of the trained one, so that it is cast and moved with the model: what ``unpatch_model`` puts back
    must be what the model would be now. What it holds is no part of the model: neither among its modules nor in its
    state dict.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        # nn.Module would register them.
        self.__dict__["original"] = original.requires_grad_(False)
        self.__dict__["_placed"] = {}
        self.training = original.training

    def at(self, device: torch.device, dtype: torch.dtype | None) -> nn.Module:
        """The original, on a device, and if one is given in a dtype."""
        original: nn.Module = self.__dict__["original"]
        if all(p.device == device and dtype in (None, p.dtype) for p in original.parameters()):
            return original
        placed: dict[Any, nn.Module] = self.__dict__["_placed"]
        with _placing:
            # A copy: another thread, with a replica of the model on another device, may be using it.
            if (device, dtype) not in placed:
                placed[device, dtype] = copy.deepcopy(original).to(device, dtype)
            return placed[device, dtype]

    def values(self) -> dict[str, Tensor]:
        """The original parameters, by name."""
        return dict(self.__dict__["original"].named_parameters())

    def assign(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.values().items():
            parameter.data.copy_(values[name])
        self.__dict__["_placed"].clear()

    def _apply(self, fn: Any, recurse: bool = True) -> OriginalProjector:
        self.__dict__["original"]._apply(fn, recurse)
        self.__dict__["_placed"].clear()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_placed": {}}
