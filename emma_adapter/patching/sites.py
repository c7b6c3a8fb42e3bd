"""Where adapters sit in a model: at the projector, and if asked for at each deepstack projector."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from ..alignment.config import EmmaConfig
from ..alignment.module import EmmaAlignment
from ..errors import PatchError
from ..models.families import ModelFamily
from ..modules.method_guard import STATE_ATTRIBUTE
from .original_projector import OriginalProjector
from .state import DEFAULT, AdapterState, state_of

#: Attribute of a projector: which of the model's projectors it is.
PLACE_ATTRIBUTE = "_emma_place"
#: The projector itself; others are named "deepstack.0." and so on. Saved tensors begin with these names.
MAIN_PLACE = ""
DEEPSTACK_PLACE = re.compile(r"deepstack\.\d+\.")


def submodule_name(adapter: str) -> str:
    """Name of an adapter's alignment as a submodule of its projector."""
    return "emma" if adapter == DEFAULT else f"emma_{adapter}"


def mark(projector: nn.Module, place: str, state: AdapterState) -> None:
    """Make a projector one that adapters sit at."""
    setattr(projector, STATE_ATTRIBUTE, state)
    setattr(projector, PLACE_ATTRIBUTE, place)


def check_unshared(*modules: nn.Module, state: AdapterState | None = None) -> None:
    """Check that nothing of a model which is about to be patched, or of the patched one with this state, is a part of
    another patched model too: hooks find their adapter through the module that they run on.

    Raises:
        PatchError: if it is.
    """
    for module in modules:
        if getattr(module, STATE_ATTRIBUTE, state) is not state:
            raise PatchError(
                f"the model shares its {type(module).__name__} with another model that is patched, and both would go "
                "through one adapter: give this one a copy (copy.deepcopy) made before the other was patched, or "
                "unpatch_model the other first"
            )


def attach(projector: nn.Module, adapter: str, alignment: EmmaAlignment) -> None:
    _holder(projector).add_module(submodule_name(adapter), alignment)


def attach_original(projector: nn.Module, adapter: str, original: OriginalProjector) -> None:
    _holder(projector).add_module(_original_name(adapter), original)


def _original_name(adapter: str) -> str:
    # No adapter can be called so.
    return f"{submodule_name(adapter)}-original"


def _holder(projector: nn.Module) -> nn.Module:
    holder = projector
    while isinstance(holder, nn.Sequential):
        # It would run the alignment as one of its layers; a layer's own submodules it leaves alone.
        holder = next(iter(holder.children()))
    return holder


def detach(module: nn.Module) -> None:
    """Take off what :func:`mark`, :func:`attach` and :func:`attach_original` put on a projector, or patching on another
    module."""
    if PLACE_ATTRIBUTE in module.__dict__:
        delattr(module, PLACE_ATTRIBUTE)
        for holder in list(module.modules()):
            ours = [n for n, child in holder._modules.items() if isinstance(child, (EmmaAlignment, OriginalProjector))]
            for name in ours:
                delattr(holder, name)
    delattr(module, STATE_ATTRIBUTE)


def remove(projector: nn.Module, adapter: str) -> None:
    """Take one adapter off a projector."""
    _remove(projector, submodule_name(adapter), EmmaAlignment)
    remove_original(projector, adapter)


def remove_original(projector: nn.Module, adapter: str) -> None:
    """Undo :func:`attach_original`."""
    _remove(projector, _original_name(adapter), OriginalProjector)


def _remove(projector: nn.Module, name: str, kind: type[nn.Module]) -> None:
    for holder in list(projector.modules()):
        if isinstance(holder._modules.get(name), kind):
            delattr(holder, name)


def alignment_at(projector: nn.Module, adapter: str) -> EmmaAlignment:
    """An adapter's alignment at a projector, also at one that another tool has wrapped.

    Raises:
        PatchError: if another tool has replaced the part of the projector that held it.
    """
    module: Any = projector
    while module is not None:
        alignment = getattr(module, submodule_name(adapter), None)
        if isinstance(alignment, EmmaAlignment):
            return alignment
        wrapped = getattr(module, "base_layer", None)
        module = getattr(module, "0", None) if wrapped is None else wrapped
    raise PatchError(
        f"a part of the projector, a {type(projector).__name__}, was replaced after patch_model, and the adapter is "
        "gone with it: change the model first, then patch it and load_adapter"
    )


def is_aligned(state: AdapterState, projector: nn.Module, adapter: str) -> bool:
    """False at a deepstack projector where only other adapters of the model sit."""
    place: str = getattr(projector, PLACE_ATTRIBUTE)
    return place == MAIN_PLACE or state.adapters[adapter].config.align_deepstack


def projectors(model: nn.Module, adapter: str | None = None) -> dict[str, nn.Module]:
    """The projectors that an adapter of a patched model sits at, by place; default: the active adapter."""
    state = state_of(model)
    config = state.adapters[adapter or state.active].config
    return places(state.family, config, state.family.inner(model))


def places(family: ModelFamily, config: EmmaConfig, inner: nn.Module) -> dict[str, nn.Module]:
    """The projectors that an adapter with this config sits at, by place."""
    found = {MAIN_PLACE: family.projector(inner)}
    if config.align_deepstack:
        further = family.deepstack_projectors(inner)
        found |= {f"deepstack.{number}.": projector for number, projector in enumerate(further)}
    return found


def alignments(model: nn.Module, adapter: str | None = None) -> dict[str, EmmaAlignment]:
    """An adapter's modules, by place; default: the active adapter's."""
    name = adapter or state_of(model).active
    return {place: alignment_at(projector, name) for place, projector in projectors(model, name).items()}


def named_parameters(model: nn.Module, adapter: str | None = None) -> dict[str, nn.Parameter]:
    """An adapter's parameters, by their name in the adapter; default: the active adapter's."""
    return {
        place + name: parameter
        for place, alignment in alignments(model, adapter).items()
        for name, parameter in alignment.named_parameters()
    }


def all_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of all adapters of a patched model."""
    return [
        parameter for adapter in state_of(model).adapters for parameter in named_parameters(model, adapter).values()
    ]


def state_dict(model: nn.Module, adapter: str | None = None, *, keep_vars: bool = False) -> dict[str, Tensor]:
    """An adapter's tensors, by their name in the adapter; default: the active adapter's."""
    return {
        place + name: tensor
        for place, alignment in alignments(model, adapter).items()
        for name, tensor in alignment.state_dict(keep_vars=keep_vars).items()
    }


def projector_parameters(projector: nn.Module) -> dict[str, nn.Parameter]:
    """A projector's own parameters by name, without the adapters'."""
    own = projector_tensors(projector)
    return {name: parameter for name, parameter in projector.named_parameters() if name in own}


def projector_tensors(projector: nn.Module) -> dict[str, Tensor]:
    """A projector's own parameters and buffers by name, without the adapters'."""
    adapter = {
        id(tensor)
        for module in projector.modules()
        if isinstance(module, EmmaAlignment)
        for tensor in (*module.parameters(), *module.buffers())
    }
    tensors = {**dict(projector.named_parameters()), **dict(projector.named_buffers())}
    return {name: tensor for name, tensor in tensors.items() if id(tensor) not in adapter}
