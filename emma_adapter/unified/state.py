"""The state of a unified model beside its parameters: one object on the model, its inner model and its projector."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import PatchError
from ..models.families import ModelFamily
from .autoencoder import LatentCoder
from .config import UnifiedConfig
from .module import UnifiedModule

STATE_ATTRIBUTE = "_emma_unified_state"
#: Name of the outer model's submodule that holds the branches' parameters, by name of the branch.
MODULE_NAME = "emma_unified"
#: The name of a model's first branch.
DEFAULT = "default"


@dataclass
class Branch:
    """A generation branch: trained parameters, and the config and autoencoder that they are for."""

    config: UnifiedConfig
    module: UnifiedModule
    coder: LatentCoder

    def __deepcopy__(self, memo: dict[int, Any]) -> Branch:
        return Branch(self.config, copy.deepcopy(self.module, memo), self.coder)


class UnifiedState:
    """The state of a unified model, whose copies share its processor and frozen autoencoders, and nothing else."""

    def __init__(self, family: ModelFamily, branch: Branch, processor: Any) -> None:
        self.family = family
        self.processor = processor
        #: By name; their modules are also those below ``MODULE_NAME`` of the model.
        self.branches = {DEFAULT: branch}
        #: The name of the branch that draws, is trained and saved.
        self.active = DEFAULT
        #: Arguments of :class:`tqdm.auto.tqdm`.
        self.progress_bar: dict[str, Any] = {}
        #: Arguments of :func:`torch.compile`; None: steps are not compiled.
        self.compile_options: dict[str, Any] | None = None
        #: Which parameters were trainable before ``train_only``, by name; None if it wasn't called.
        self.trainable_before: dict[str, bool] | None = None

    @property
    def branch(self) -> Branch:
        return self.branches[self.active]

    @property
    def config(self) -> UnifiedConfig:
        return self.branch.config

    @property
    def module(self) -> UnifiedModule:
        return self.branch.module

    @property
    def coder(self) -> LatentCoder:
        return self.branch.coder

    def __deepcopy__(self, memo: dict[int, Any]) -> UnifiedState:
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        for name, value in vars(self).items():
            setattr(twin, name, value if name in {"family", "processor"} else copy.deepcopy(value, memo))
        return twin


def unified_state(model: nn.Module) -> UnifiedState:
    """Return the state of a unified model.

    Raises:
        PatchError: if the model has none.
    """
    state = model.__dict__.get(STATE_ATTRIBUTE)
    if not isinstance(state, UnifiedState):
        raise PatchError(
            f"this {type(model).__name__} was not made to draw: unify_model(model, …) or load_unified(model, …) first"
        )
    return state


def compute_dtype(text: Any) -> torch.dtype:
    """Return the dtype in which a decoder computes: that of its final norm, which is never quantized."""
    dtype: torch.dtype = next(text.norm.parameters()).dtype
    return dtype
