"""An adapter that a training run leaves out by accident."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import nn

from ..alignment.module import EmmaAlignment
from ..modules.sharding import is_elsewhere
from .state import state_of


def is_identity(adapter: Iterable[nn.Parameter]) -> bool:
    """Return whether an adapter of these parameters has learned nothing yet."""
    # What makes a new one the identity is a weight of zeros.
    return any(parameter.ndim > 1 and not parameter.any() for parameter in adapter)


def warn_if_left_out(model: nn.Module) -> None:
    """Say once if a model is trained whose adapter was frozen before it has learned anything."""
    state = state_of(model)
    if state.seen_training or torch.compiler.is_compiling():
        return
    state.seen_training = True
    alignments = [module for module in model.modules() if isinstance(module, EmmaAlignment)]
    adapter = [parameter for alignment in alignments for parameter in alignment.parameters()]
    if any(parameter.requires_grad for parameter in adapter) or not any(p.requires_grad for p in model.parameters()):
        return
    if any(is_elsewhere(parameter) for parameter in adapter):
        return
    if is_identity(adapter):
        warnings.warn(
            "the model is trained, but its EMMA adapter is frozen and has learned nothing yet (a tool that freezes the "
            "whole model, as prepare_model_for_kbit_training, does that): patch_model after it, or "
            "adapter.alignment.requires_grad_(True) before the optimizer is made",
            stacklevel=2,
        )
