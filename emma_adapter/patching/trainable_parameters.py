"""The trainable parameters of a patched model, and their groups in an optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError, PatchError
from ..messages import listed
from ..modules.trainability import check_rate
from . import sites
from .precision import quantized_tensors, with_the_projector_as_it_is
from .projectors import give_own_projectors, is_wrapped
from .state import state_of


def count_parameters(model: nn.Module, adapter: str | None = None) -> tuple[int, int]:
    """Return the sizes of an adapter (default: the active one), and of the model with that adapter's alignments alone.

    Own projectors count in neither.
    """
    state = state_of(model)
    attached = state.current if adapter is None else state.adapters[adapter]
    size = sum(parameter.numel() for parameter in attached.named_parameters().values())
    all_adapters = sum(parameter.numel() for parameter in state.parameters())
    return size, sum(parameter.numel() for parameter in model.parameters()) - all_adapters + size


def train_only(model: nn.Module, *, projector: bool) -> None:
    """Freeze everything but the active adapter and, if asked for, a projector of its own."""
    state = state_of(model)
    adapter = state.current
    if projector and is_wrapped(adapter):
        raise PatchError(
            "the projector is wrapped by PEFT (LoRA, or modules_to_save), so that it can't be saved as one; "
            "merge_and_unload() first, or train_only() without projector=True"
        )
    if projector:
        _check_projector_trainable(model)
        give_own_projectors(state, adapter)
    if state.trainable_before is None:
        state.trainable_before = _trainable(model)
    model.requires_grad_(False)
    for parameter in adapter.named_parameters().values():
        parameter.requires_grad_(True)
    if projector:
        for parameter in adapter.projector_parameters().values():
            parameter.requires_grad_(True)


def unfreeze(model: nn.Module) -> None:
    """Make trainable again what :func:`train_only` froze.

    The active adapter's own projector becomes trainable where the model's is, in place of which it runs.
    """
    state = state_of(model)
    _make_trainable(model, state.trainable_before or {})
    state.trainable_before = None
    own_projectors = state.current.own_projectors()
    for place, site in state.current.sites().items():
        if place in own_projectors:
            for name, parameter in sites.projector_parameters(site).items():
                own_projectors[place].projector.get_parameter(name).requires_grad_(parameter.requires_grad)


def _check_projector_trainable(model: nn.Module) -> None:
    """Check that the projector has no quantized weights, which no optimizer can change.

    Raises:
        PatchError: if it has some.
    """
    projectors = state_of(model).current.sites()
    quantized = [place + name for place in projectors for name in quantized_tensors(model, projectors[place])]
    if quantized:
        raise PatchError(
            f"the projector's weights {listed(sorted(quantized))} are quantized and can't be trained: train_only() "
            f"without projector=True, or {with_the_projector_as_it_is(model, projectors.values())}"
        )


def undo_train_only(model: nn.Module) -> None:
    """Make trainable again what was trainable before :func:`train_only`."""
    _make_trainable(model, state_of(model).trainable_before or {})


@contextmanager
def as_before_train_only(model: nn.Module) -> Iterator[None]:
    """Undo :func:`train_only` in the block, in which another tool freezes or replaces parts of the model.

    What the tool leaves trainable is what ``unpatch_model`` will go back to.
    """
    state = state_of(model)
    if state.trainable_before is None:
        yield
        return
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    _make_trainable(model, state.trainable_before)
    try:
        yield
    finally:
        state.trainable_before = _trainable(model)
        for parameter in frozen:
            parameter.requires_grad_(False)


def _trainable(model: nn.Module) -> dict[str, bool]:
    """Return by name whether each of the model's own parameters is trainable."""
    adapters = {id(parameter) for parameter in state_of(model).parameters()}
    return {n: p.requires_grad for n, p in model.named_parameters() if id(p) not in adapters}


def _make_trainable(model: nn.Module, trainable: Mapping[str, bool]) -> None:
    for name, parameter in model.named_parameters():
        if name in trainable:
            parameter.requires_grad_(trainable[name])


def parameter_groups(
    model: nn.Module, lr: float, *, projector_lr: float | None, weight_decay: float
) -> list[dict[str, Any]]:
    """Return one group for the adapter, and one for the adapter's own projector if that is trained.

    The model's projector is in neither, trainable or not: trained here, it would be neither saved nor restored.

    Raises:
        ConfigError: if a rate is no number, or negative.
    """
    check_rate("lr", lr)
    check_rate("weight_decay", weight_decay)
    if projector_lr is not None:
        check_rate("projector_lr", projector_lr)
    attached = state_of(model).current
    adapter = [parameter for parameter in attached.named_parameters().values() if parameter.requires_grad]
    projector = [parameter for parameter in attached.projector_parameters().values() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [{"params": adapter, "lr": lr, "weight_decay": weight_decay}]
    if projector:
        rate = lr if projector_lr is None else projector_lr
        groups.append({"params": projector, "lr": rate, "weight_decay": weight_decay})
    return groups


def regroup(
    model: nn.Module, optimizer: torch.optim.Optimizer, lr: float, *, projector_lr: float | None, weight_decay: float
) -> None:
    """Move the parameters of :func:`parameter_groups` from an optimizer's groups to groups of their own.

    Raises:
        ConfigError: if the optimizer has made a step, or a scheduler knows its groups.
    """
    groups = parameter_groups(model, lr, projector_lr=projector_lr, weight_decay=weight_decay)
    if optimizer.state or any("initial_lr" in group for group in optimizer.param_groups):
        raise ConfigError(
            "regroup() needs an optimizer that has made no step and has no scheduler yet, which would go on with the "
            "groups of before: call it right after the optimizer is made"
        )
    moved = {id(parameter) for group in groups for parameter in group["params"]}
    options: dict[int, dict[str, Any]] = {}
    listed_values: dict[int, dict[str, Any]] = {}
    for old_group in optimizer.param_groups:
        parameters = old_group["params"]
        # Lists with an entry for each parameter, such as LoRA-FA's names: entries go with their parameters.
        lists = [
            key
            for key, values in old_group.items()
            if isinstance(values, list) and len(values) == len(parameters) and key not in optimizer.defaults
        ]
        for number, parameter in enumerate(parameters):
            options[id(parameter)] = {key: value for key, value in old_group.items() if key not in lists}
            listed_values[id(parameter)] = {key: old_group[key][number] for key in lists if key != "params"}
        staying = [number for number, parameter in enumerate(parameters) if id(parameter) not in moved]
        old_group.update({key: [old_group[key][number] for number in staying] for key in lists})
    for group in groups:
        entries = [listed_values.get(id(parameter), {}) for parameter in group["params"]]
        moved_lists = {key: [entry[key] for entry in entries] for key in entries[0]} if all(entries) else {}
        optimizer.add_param_group({**options.get(id(group["params"][0]), {}), **moved_lists, **group})
