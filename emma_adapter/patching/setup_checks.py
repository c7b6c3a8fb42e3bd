"""Checks of how a patched model is set up.

Its projector may have been replaced, it may have been wrapped before it was patched, or a training run may leave its
adapter out by accident.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import nn

from ..alignment.module import EmmaAlignment
from ..errors import PatchError
from ..modules import private
from ..modules.sharding import is_elsewhere, is_sharded
from .sites import PLACE_ATTRIBUTE, places
from .state import AdapterState, state_of


def is_identity(adapter: Iterable[nn.Parameter]) -> bool:
    """Return whether an adapter with these parameters has learned nothing yet."""
    # A new adapter is the identity because one of its weights is all zeros.
    return any(parameter.ndim > 1 and not parameter.any() for parameter in adapter)


def warn_if_left_out(model: nn.Module) -> None:
    """Warn once if a model is trained while its adapter is frozen and has learned nothing yet."""
    state = state_of(model)
    if state.seen_training or torch.compiler.is_compiling():
        return
    state.seen_training = True
    alignments = [module for module in model.modules() if isinstance(module, EmmaAlignment)]
    parameters = [parameter for alignment in alignments for parameter in alignment.parameters()]
    if any(p.requires_grad for p in parameters) or not any(p.requires_grad for p in model.parameters()):
        return
    if any(is_elsewhere(parameter) for parameter in parameters):
        return
    if is_identity(parameters):
        warnings.warn(
            "the model is trained, but its EMMA adapter is frozen and has learned nothing yet (a tool that freezes the "
            "whole model, as prepare_model_for_kbit_training, does that): patch_model after it, or "
            "adapter.alignment.requires_grad_(True) before the optimizer is made",
            stacklevel=2,
        )


def check_in_place(state: AdapterState, inner: nn.Module) -> None:
    """Check that the projectors which the model will call are those that were patched.

    Raises:
        PatchError: if another tool has replaced a projector, or wrapped it so that its own weights would read visual
            tokens that are not aligned, as PEFT's LoRA on a projector that is a single layer.
    """
    for projector in places(state.family, state.config, inner).values():
        if not any(PLACE_ATTRIBUTE in module.__dict__ for module in projector.modules()):
            raise PatchError(
                f"the model's projector, a {type(projector).__name__}, is not the one that was patched, and the "
                "adapter is gone with it: change the model first, then patch it and load_adapter"
            )
        if hasattr(getattr(projector, "base_layer", None), PLACE_ATTRIBUTE):
            raise PatchError(
                f"the projector was wrapped in a {type(projector).__name__} after patch_model, whose own weights would "
                "read visual tokens without the instruction; wrap first, then patch_model"
            )


def check_wrapped_once_patched(alignment: nn.Module) -> None:
    """Check that DistributedDataParallel and FSDP, if they are in use, know the adapter's parameters.

    Raises:
        PatchError: if the model was wrapped before it was patched, or the adapter sharded apart from it.
    """
    parameters = list(alignment.parameters())
    if any(is_sharded(parameter) for parameter in parameters):
        raise PatchError(
            "the adapter was sharded on its own (fully_shard(adapter.alignment), or an auto-wrap policy by size): a "
            "process without images would leave the others waiting for its part. Shard the model around it: the "
            "adapter is small, and belongs in the group of its projector or of the whole model"
        )
    ids_in_ddp = private.parameters_of_running_ddp() if torch.is_grad_enabled() else None
    if ids_in_ddp is None:
        return
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    if any(id(parameter) not in ids_in_ddp for parameter in trainable):
        raise PatchError(
            "the model was patched after it was wrapped in DistributedDataParallel, which would leave each process "
            "with an adapter of its own: patch_model or load_adapter first, then wrap"
        )
