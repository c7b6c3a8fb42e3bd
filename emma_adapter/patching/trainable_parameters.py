"""What is trainable, and in which parameter groups."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, PatchError
from ..files.untrusted import listed
from ..modules.sharding import is_fully_sharded
from . import sites
from .hooks import remove_hooks
from .original_projector import OriginalProjector
from .precision import quantized_tensors, with_the_projector_as_it_is
from .state import state_of

#: In the name of a parameter that PEFT has wrapped.
_WRAPPERS = re.compile(r"(?<![^.])(base_layer|original_module|modules_to_save\.[^.]+)\.")


def count_parameters(model: nn.Module, adapter: str | None = None) -> tuple[int, int]:
    """The numbers in an adapter (default: the active one), and in the model with it and without its other adapters."""
    own = sum(parameter.numel() for parameter in sites.named_parameters(model, adapter).values())
    adapters = sum(parameter.numel() for parameter in sites.all_parameters(model))
    return own, sum(parameter.numel() for parameter in model.parameters()) - adapters + own


def projector_parameters(model: nn.Module, adapter: str | None = None) -> dict[str, nn.Parameter]:
    """The parameters, by place and name, of the projectors themselves that an adapter sits at; default: the active
    adapter."""
    return {
        place + name: parameter
        for place, projector in sites.projectors(model, adapter).items()
        for name, parameter in sites.projector_parameters(projector).items()
    }


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that adapter folders hold: the adapters', and the projector's if it belongs to the active one."""
    projector = projector_parameters(model).values() if state_of(model).current.original_projectors else ()
    return [*sites.all_parameters(model), *projector]


def is_wrapped(model: nn.Module) -> bool:
    """Whether PEFT has put weights of its own around those of the projector."""
    return any(_WRAPPERS.search(name) for name in projector_parameters(model))


def train_only(model: nn.Module, *, projector: bool) -> None:
    """Freeze everything but the adapter, and optionally the projector."""
    if projector and is_wrapped(model):
        raise PatchError(
            "the projector is wrapped by PEFT (LoRA, or modules_to_save), so that it can't be saved as one; "
            "merge_and_unload() first, or train_only() without projector=True"
        )
    if projector:
        _check_projector_trainable(model)
        keep_original_projectors(model)
    remember_trainable(model)
    model.requires_grad_(False)
    for parameter in sites.named_parameters(model).values():
        parameter.requires_grad_(True)
    if projector:
        for parameter in projector_parameters(model).values():
            parameter.requires_grad_(True)


def unfreeze(model: nn.Module) -> None:
    """Make trainable again what :func:`train_only` froze."""
    state = state_of(model)
    _make_trainable(model, state.trainable_before or {})
    state.trainable_before = None


def _check_projector_trainable(model: nn.Module) -> None:
    """Raises:
    PatchError: if the projector has quantized weights, which no optimizer can change.
    """
    projectors = sites.projectors(model)
    quantized = [place + name for place in projectors for name in quantized_tensors(model, projectors[place])]
    if quantized:
        raise PatchError(
            f"the projector's weights {listed(sorted(quantized))} are quantized and can't be trained: train_only() "
            f"without projector=True, or {with_the_projector_as_it_is(model, projectors.values())}"
        )


def remember_trainable(model: nn.Module) -> None:
    """Note which of the model's parameters are trainable, before the first of them is frozen."""
    state = state_of(model)
    if state.trainable_before is None:
        state.trainable_before = _trainable(model)


def undo_train_only(model: nn.Module) -> None:
    """Make trainable again what was, and give the projector its original values."""
    reset_projectors(model)
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
    adapters = {id(parameter) for parameter in sites.all_parameters(model)}
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
    adapter = [parameter for parameter in sites.named_parameters(model).values() if parameter.requires_grad]
    projector = []
    if state_of(model).current.original_projectors:
        projector = [parameter for parameter in projector_parameters(model).values() if parameter.requires_grad]
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


def keep_original_projectors(model: nn.Module, adapter: str | None = None) -> None:
    """Remember the projectors as they were before training, for an adapter (default: the active one) that has its own,
    so that ``disabled()`` and ``unpatch_model`` can go back to them."""
    state = state_of(model)
    named = state.adapters[adapter or state.active]
    if named.original_projectors:
        return
    if is_fully_sharded(model):
        raise PatchError(
            "FSDP has sharded the projector, of which the original is to be kept: train_only(projector=True) first, "
            "then shard"
        )
    projectors = sites.projectors(model, adapter)
    kept = {
        place: _original(projector, state.current.original_projectors.get(place))
        for place, projector in projectors.items()
    }
    named.original_projectors = kept
    for place, projector in projectors.items():
        sites.attach_original(projector, adapter or state.active, kept[place])


def _original(projector: nn.Module, kept: OriginalProjector | None) -> OriginalProjector:
    """What to keep for one more adapter; ``kept`` is what the active one keeps, if the projector is trained with it."""
    if kept is not None:
        return copy.deepcopy(kept)
    original = copy.deepcopy(projector)
    remove_hooks(original)
    sites.detach(original)
    return OriginalProjector(original)


def trained_projector_parameters(model: nn.Module, adapter: str | None = None) -> Mapping[str, Tensor]:
    """The projectors' parameters, by place and name, if they belong to the adapter (default: the active one); else
    none. They are copies where another adapter is active."""
    state = state_of(model)
    if adapter not in (None, state.active):
        return state.adapters[adapter].parked_projectors
    return projector_parameters(model) if state.current.original_projectors else {}


def trained_projectors(model: nn.Module) -> dict[str, Tensor]:
    """The same of the active adapter, outside of any graph."""
    return {name: parameter.detach() for name, parameter in trained_projector_parameters(model).items()}


def original_projectors(model: nn.Module, adapter: str | None = None) -> dict[str, Tensor]:
    """The tensors that :func:`trained_projector_parameters` had before training."""
    state = state_of(model)
    return {
        place + name: parameter
        for place, original in state.adapters[adapter or state.active].original_projectors.items()
        for name, parameter in original.values().items()
    }


def assign(model: nn.Module, adapter: str, alignment: Mapping[str, Tensor], projector: Mapping[str, Tensor]) -> None:
    """Give an adapter, and the projectors trained with it if there are any in ``projector``, these values.

    The adapter takes their dtype too: it is saved as it was used. Projectors of an adapter that isn't active are put
    by until it is.
    """
    own = sites.state_dict(model, adapter, keep_vars=True)
    parameters = projector_parameters(model, adapter)
    # All that needs memory comes before the first change.
    alignment = {name: value.to(own[name].device) for name, value in alignment.items()}
    projector = {name: value.to(parameters[name].device, parameters[name].dtype) for name, value in projector.items()}
    if projector:
        keep_original_projectors(model, adapter)
    # Without trained projectors in the file, those of before give way.
    projector = projector or {name: value.clone() for name, value in original_projectors(model, adapter).items()}
    state = state_of(model)
    if adapter == state.active:
        _check_not_offloaded(*(parameters[name] for name in projector))
        for name, value in projector.items():
            parameters[name].data.copy_(value)
    else:
        state.adapters[adapter].parked_projectors, state.adapters[adapter].stand_ins = projector, {}
    for name, value in alignment.items():
        own[name].data = value


def reset_projectors(model: nn.Module) -> None:
    """Give the projectors their original values again; they may go on being trained.

    Raises:
        PatchError: if they were trained, and are offloaded.
    """
    originals = original_projectors(model)
    # A LoRA that came too late may be around them, or a copy that PEFT trains beside them.
    for name, parameter in projector_parameters(model).items():
        original = originals.get(_WRAPPERS.sub("", name))
        if original is not None:
            _check_not_offloaded(parameter)
            parameter.data.copy_(original)


def _check_not_offloaded(*projector: nn.Parameter) -> None:
    if any(parameter.is_meta for parameter in projector):
        raise PatchError(
            "the trained projector is offloaded, so that its original values can't be put back; take accelerate's "
            "hooks off first: accelerate.hooks.remove_hook_from_submodules(model)"
        )
