"""References that training is compared with: a frozen copy of a patched model, or of its adapter."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PatchError
from ..models.registry import find_family
from ..modules import sharding
from ..modules.method_guard import MethodGuard
from ..modules.torch_modes import undisturbed
from ..modules.wrappers import base_of
from ..patching.state import AdapterState, state_of
from . import named_adapters
from .patch import install

#: The adapter that reference passes go through.
REFERENCE = "reference"


@undisturbed()
def keep(model: nn.Module) -> None:
    """Put a frozen copy of the active adapter on the model itself, for when its LoRA is off.

    It replaces a copy that was kept before.
    """
    state = state_of(model)
    if state.reference is not None:
        named_adapters.remove(model, state.reference)
    named_adapters.add_copy(model, REFERENCE)
    state.reference = REFERENCE


@undisturbed()
def frozen_copy(model: nn.Module) -> nn.Module:
    """Return a copy of the model as it is now, frozen and in eval mode. It shares what the model doesn't train.

    Raises:
        PatchError: if the model is not patched, or sharded.
    """
    model = base_of(model)
    state = state_of(model)
    _check_whole(model)
    shared = {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad}
    pipelines = {id(adapter.pipeline): adapter.pipeline for adapter in state.adapters.values()}
    reference = copy.deepcopy(model, {**shared, **pipelines})
    if not hasattr(reference, "_hf_hook"):
        # A Trainer's own forward on the model, once copied, may go on calling the model that it was made for.
        for name in ("forward", "_original_forward"):
            reference.__dict__.pop(name, None)
    return _freeze(reference, shared)


@undisturbed()
def make_alike(reference: nn.Module, model: nn.Module) -> None:
    """Turn ``reference``, the base model as another tool has loaded it, into a frozen copy of ``model``.

    Raises:
        PatchError: if one of them is sharded, or they are of different kinds.
    """
    state = state_of(model)
    _check_whole(reference)
    _check_whole(model)
    family = find_family(reference)
    adapters = {id(parameter) for parameter in state.parameters()}
    parameters = {n: p for n, p in model.named_parameters(remove_duplicate=False) if id(p) not in adapters}
    copies = dict(reference.named_parameters(remove_duplicate=False))
    if {n: p.shape for n, p in parameters.items()} != {n: p.shape for n, p in copies.items()}:
        raise PatchError(
            f"the reference is a {type(reference).__name__} of other parameters than the {type(model).__name__} that "
            "is trained: give the trainer ref_model=reference_model(model)"
        )
    alignments, projectors = copy.deepcopy((state.current.alignments(), state.current.own_projectors()))
    install(reference, AdapterState(family, state.config, state.pipeline, reference), alignments, projectors)
    shared = {}
    for name, parameter in parameters.items():
        own_copy = copies[name]
        if parameter.requires_grad or (parameter.device, parameter.dtype) != (own_copy.device, own_copy.dtype):
            own_copy.data.copy_(parameter.data)
            continue
        shared[id(parameter)] = parameter
        holder, _, leaf = name.rpartition(".")
        reference.get_submodule(holder)._parameters[leaf] = parameter
    _freeze(reference, shared)


def _check_whole(model: nn.Module) -> None:
    if sharding.is_fully_sharded(model) or any(map(sharding.is_partitioned, model.parameters())):
        raise PatchError(
            "the model, or its reference, is sharded by FSDP or DeepSpeed, and can't be copied: make the reference "
            "before, ref_model=reference_model(model), or train a LoRA beside the adapter, whose reference is a copy "
            "of the adapter alone"
        )


def _freeze(reference: nn.Module, shared: dict[int, nn.Parameter]) -> nn.Module:
    for parameter in reference.parameters():
        parameter.requires_grad_(False)
    MethodGuard.install(reference, "parameters", functools.partial(_unshared, frozenset(shared)))
    reference.register_forward_pre_hook(_check_frozen)
    return reference.eval()


def _unshared(
    shared: frozenset[int],
    reference: nn.Module,
    original: Callable[..., Iterator[nn.Parameter]],
    *args: Any,
    **kwargs: Any,
) -> Iterator[Tensor]:
    """Yield the parameters of a reference, and copies of those that it shares with the model that is trained.

    A tool that writes into shared ones, as TRL's ``SyncRefModelCallback`` does to mix the two, would write into both.
    """
    for parameter in original(*args, **kwargs):
        yield parameter.detach().clone() if id(parameter) in shared else parameter


def _check_frozen(reference: nn.Module, args: Any) -> None:
    if not torch.compiler.is_compiling() and any(value.requires_grad for _, value in reference.named_parameters()):
        raise PatchError(
            "a parameter that the reference shares with the model it was made of, because it was frozen then, is "
            "trained by now, and the reference with it: first make everything trainable that will be, then "
            "reference_model(model)"
        )
