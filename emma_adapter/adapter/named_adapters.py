"""Several adapters on one model, each with a name, a config and modules of its own; one of them is active."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from ..alignment.config import EmmaConfig
from ..alignment.module import EmmaAlignment
from ..errors import PatchError
from ..models.families import ModelFamily
from ..modules.sharding import execution_device, is_fully_sharded
from ..patching import sites
from ..patching.attached_adapter import AttachedAdapter
from ..patching.hooks import has_projector_hooks, install_projector_hooks
from ..patching.own_projector import OwnProjector
from ..patching.state import AdapterState, state_of
from .config_from_model import make_pipeline, make_reader, resolve_encoder, resolve_sizes


def add(
    model: nn.Module, name: str, config: EmmaConfig, processor: Any, instruction_encoder: str | nn.Module | None
) -> None:
    """Add an adapter that is not active yet, and frozen. Without ``processor`` it reads prompts as the active adapter.

    Raises:
        PatchError: if the name is taken, or a submodule can't have it.
    """
    state = state_of(model)
    _check_addable(model, name)
    inner = state.family.inner(model)
    config = resolve_sizes(config, state.family, inner)
    sites.check_unshared(*sites.places(state.family, config, inner).values(), state=state)
    config, encoder = resolve_encoder(config, instruction_encoder, inner)
    if processor is None:
        reader = state.pipeline.reader.with_policy(config.instruction_policy)
    else:
        reader = make_reader(model, config, processor)
    alignments = make_alignments(state.family, config, inner)
    added = state.adapters[name] = AttachedAdapter(state, name, config, make_pipeline(config, reader, encoder))
    attach(model, added, alignments)
    added.requires_grad_(False)


def add_copy(model: nn.Module, name: str) -> None:
    """Add a frozen copy of the active adapter, and of the projectors trained with it.

    Raises:
        PatchError: as in :func:`add`.
    """
    state = state_of(model)
    _check_addable(model, name)
    active = state.current
    alignments, projectors = copy.deepcopy((active.alignments(), active.own_projectors()))
    added = state.adapters[name] = AttachedAdapter(state, name, active.config, active.pipeline)
    attach(model, added, alignments, projectors)
    added.requires_grad_(False)


def _check_addable(model: nn.Module, name: str) -> None:
    state = state_of(model)
    if not isinstance(name, str) or not name.isidentifier():
        raise PatchError(f"the name of an adapter must be letters, digits and underscores; got {name!r}")
    if name in state.adapters:
        raise PatchError(f"the model has an adapter {name!r} already: {sorted(state.adapters)}; choose another name")
    if is_fully_sharded(model):
        raise PatchError("the model is sharded by FSDP: add every adapter first, then shard")


def make_alignments(family: ModelFamily, config: EmmaConfig, inner: nn.Module) -> dict[str, EmmaAlignment]:
    """Return the modules of a new adapter, by place, each on the device where its projector runs."""
    return {
        place: EmmaAlignment(config).to(_execution_device(projector, inner)).train(inner.training)
        for place, projector in sites.places(family, config, inner).items()
    }


def attach(
    model: nn.Module,
    adapter: AttachedAdapter,
    alignments: Mapping[str, EmmaAlignment],
    projectors: Mapping[str, OwnProjector] = MappingProxyType({}),
) -> None:
    """Attach the modules of an adapter, and projectors of its own, to the model's projectors."""
    state = state_of(model)
    for place, projector in adapter.sites().items():
        sites.mark(projector, place, state)
        sites.attach(projector, adapter.name, alignments[place])
        if place in projectors:
            sites.attach(projector, adapter.name, projectors[place])
        if not has_projector_hooks(projector):
            install_projector_hooks(projector)


def activate(model: nn.Module, name: str) -> None:
    """Make another adapter the active one. It becomes trainable if the one before was; that one is frozen.

    Raises:
        PatchError: if there is no adapter of that name.
    """
    state = state_of(model)
    incoming, outgoing = _known(state, name), state.current
    if incoming is outgoing:
        return
    trainable = any(parameter.requires_grad for parameter in outgoing.named_parameters().values())
    outgoing.requires_grad_(False)
    state.active = name
    incoming.requires_grad_(trainable)


def remove(model: nn.Module, name: str) -> None:
    """Take an adapter off the model.

    Raises:
        PatchError: if there is no adapter of that name, or it is the active one.
    """
    state = state_of(model)
    _known(state, name)
    if name == state.active:
        raise PatchError(
            f"{name!r} is the active adapter: set_adapter() another one first, or unpatch_model(model) to have none"
        )
    for projector in state.adapters[name].sites().values():
        sites.remove(projector, name)
    del state.adapters[name]
    if name == state.reference:
        state.reference = None


def _known(state: AdapterState, name: str) -> AttachedAdapter:
    if not isinstance(name, str) or name not in state.adapters:
        raise PatchError(
            f"the model has no adapter {name!r}; it has {sorted(state.adapters)}: name one of these, or add_adapter() "
            "it first"
        )
    return state.adapters[name]


def _execution_device(module: nn.Module, inner: nn.Module) -> torch.device:
    # A projector may have no parameter: LLaVA's "identity".
    parameter = next(module.parameters(), None)
    if parameter is None:
        parameter = next(inner.parameters())
    if parameter.device.type != "meta":
        return parameter.device
    # Offloaded by accelerate: its hook knows where the module runs.
    return execution_device(module) or torch.device("cpu")
