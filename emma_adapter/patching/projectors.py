"""The projectors of a patched model: as they were, and as training with an adapter made them."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping

from torch import Tensor, nn

from ..errors import PatchError
from ..modules.sharding import is_fully_sharded
from . import sites
from .hooks import remove_hooks
from .original_projector import OriginalProjector
from .state import state_of

#: In the name of a parameter that PEFT has wrapped.
_WRAPPERS = re.compile(r"(?<![^.])(base_layer|original_module|modules_to_save\.[^.]+)\.")


def projector_parameters(model: nn.Module, adapter: str | None = None) -> dict[str, nn.Parameter]:
    """The parameters, by place and name, of the projectors themselves that an adapter sits at; default: the active
    adapter."""
    return {
        place + name: parameter
        for place, projector in sites.projectors(model, adapter).items()
        for name, parameter in sites.projector_parameters(projector).items()
    }


def is_wrapped(model: nn.Module) -> bool:
    """Whether PEFT has put weights of its own around those of the projector."""
    return any(_WRAPPERS.search(name) for name in projector_parameters(model))


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
