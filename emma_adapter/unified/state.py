"""What a unified model knows beside its parameters: one object on the model, its inner model and its projector."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ..errors import PatchError
from ..families import ModelFamily
from .autoencoder import LatentCoder
from .config import UnifiedConfig
from .module import UnifiedModule

STATE_ATTRIBUTE = "_emma_unified_state"
#: Of the outer model: the submodule that is trained.
MODULE_NAME = "emma_unified"


class UnifiedState:
    """Copies of the model share the processor and the frozen autoencoder, and have all else of their own."""

    def __init__(
        self, family: ModelFamily, config: UnifiedConfig, module: UnifiedModule, processor: Any, coder: LatentCoder
    ) -> None:
        self.family = family
        self.config = config
        self.module = module
        self.processor = processor
        self.coder = coder
        #: For :class:`tqdm.auto.tqdm`.
        self.progress_bar: dict[str, Any] = {}
        #: Which parameters ``train_only`` has frozen, None before.
        self.trainable_before: dict[str, bool] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> UnifiedState:
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        shared = {"family", "processor", "coder", "config"}
        for name, value in vars(self).items():
            setattr(twin, name, value if name in shared else copy.deepcopy(value, memo))
        return twin


def unified_state(model: nn.Module) -> UnifiedState:
    """Return the state of a unified model.

    Raises:
        PatchError: if ``unify_model`` was not called on it.
    """
    state = model.__dict__.get(STATE_ATTRIBUTE)
    if not isinstance(state, UnifiedState):
        raise PatchError(
            f"this {type(model).__name__} was not made to draw: unify_model(model, …) or load_unified(model, …) first"
        )
    return state


def compute_dtype(text: Any) -> torch.dtype:
    """Return the dtype that a decoder computes in: that of its final norm, which nothing quantizes."""
    dtype: torch.dtype = next(text.norm.parameters()).dtype
    return dtype
