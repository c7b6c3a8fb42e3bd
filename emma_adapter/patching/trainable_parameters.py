"""What is trainable, and in which parameter groups."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, PatchError
from ..messages import listed
from . import sites
from .precision import quantized_tensors, with_the_projector_as_it_is
from .projectors import give_own_projectors, is_wrapped
from .state import state_of


def count_parameters(model: nn.Module, adapter: str | None = None) -> tuple[int, int]:
    """The numbers in an adapter (default: the active one), and in the model with it and without what its other adapters
    and its own projector add."""
    state = state_of(model)
    attached = state.current if adapter is None else state.adapters[adapter]
    own = sum(parameter.numel() for parameter in attached.named_parameters().values())
    adapters = sum(parameter.numel() for parameter in state.parameters())
    return own, sum(parameter.numel() for parameter in model.parameters()) - adapters + own


def train_only(model: nn.Module, *, projector: bool) -> None:
    """Freeze everything but the adapter, and optionally a projector of its own."""
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
    """Make trainable again what :func:`train_only` froze, and the projector that the active adapter has in the place of
    the model's."""
    state = state_of(model)
    _make_trainable(model, state.trainable_before or {})
    state.trainable_before = None
    own = state.current.own_projectors()
    for place, site in state.current.sites().items():
        if place in own:
            for name, parameter in sites.projector_parameters(site).items():
                own[place].projector.get_parameter(name).requires_grad_(parameter.requires_grad)


def _check_projector_trainable(model: nn.Module) -> None:
    """Raises:
    PatchError: if the projector has quantized weights, which no optimizer can change.
    """
    projectors = state_of(model).current.sites()
    quantized = [place + name for place in projectors for name in quantized_tensors(model, projectors[place])]
    if quantized:
        raise PatchError(
            f"the projector's weights {listed(sorted(quantized))} are quantized and can't be trained: train_only() "
            f"without projector=True, or {with_the_projector_as_it_is(model, projectors.values())}"
        )


def undo_train_only(model: nn.Module) -> None:
    """Make trainable again what was."""
    _make_trainable(model, state_of(model).trainable_before or {})


@contextmanager
def as_before_train_only(model: nn.Module) -> Iterator[None]:
    """For another tool that freezes or replaces parts of the model: what it finds and leaves trainable is what
    ``unpatch_model`` will go back to."""
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
    """Whether the model's own parameters are trainable."""
    adapters = {id(parameter) for parameter in state_of(model).parameters()}
    return {n: p.requires_grad for n, p in model.named_parameters() if id(p) not in adapters}


def _make_trainable(model: nn.Module, wanted: Mapping[str, bool]) -> None:
    for name, parameter in model.named_parameters():
        if name in wanted:
            parameter.requires_grad_(wanted[name])


def parameter_groups(
    model: nn.Module, lr: float, *, projector_lr: float | None, weight_decay: float
) -> list[dict[str, Any]]:
    """One group for the adapter, and one for the projector if it is trained with the adapter.

    Otherwise it is the model's, trainable or not: trained here, it would neither be saved nor be put back.

    Raises:
        ConfigError: if a rate is no number, or negative.
    """
    for name, rate in (("lr", lr), ("projector_lr", projector_lr), ("weight_decay", weight_decay)):
        _check_rate(name, rate)
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
    parallel: dict[int, dict[str, Any]] = {}
    for old in optimizer.param_groups:
        parameters = old["params"]
        # Such lists, as LoRA-FA's names, go with their parameters.
        lists = [
            key
            for key, values in old.items()
            if isinstance(values, list) and len(values) == len(parameters) and key not in optimizer.defaults
        ]
        for number, parameter in enumerate(parameters):
            options[id(parameter)] = {key: value for key, value in old.items() if key not in lists}
            parallel[id(parameter)] = {key: old[key][number] for key in lists if key != "params"}
        kept = [number for number, parameter in enumerate(parameters) if id(parameter) not in moved]
        old.update({key: [old[key][number] for number in kept] for key in lists})
    for group in groups:
        of_before = [parallel.get(id(parameter), {}) for parameter in group["params"]]
        lists_of_before = {key: [values[key] for values in of_before] for key in of_before[0]} if all(of_before) else {}
        optimizer.add_param_group({**options.get(id(group["params"][0]), {}), **lists_of_before, **group})


def _check_rate(name: str, rate: Any) -> None:
    # An optimizer looks at its own rate, never at those of its groups.
    if isinstance(rate, Tensor) or (rate is None and name == "projector_lr"):
        return
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate < math.inf:
        raise ConfigError(f"{name} of parameter_groups must be a number >= 0; got {rate!r}")
