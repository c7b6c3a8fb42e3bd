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
from .own_projector import OwnProjector

#: Name of the adapter that ``patch_model`` makes.
DEFAULT = "default"
#: Attribute of a projector: which of the model's projectors it is.
PLACE_ATTRIBUTE = "_emma_place"
#: The projector itself; others are named "deepstack.0." and so on. Saved tensors begin with these names.
MAIN_PLACE = ""
DEEPSTACK_PLACE = re.compile(r"deepstack\.\d+\.")


def places(family: ModelFamily, config: EmmaConfig, inner: nn.Module) -> dict[str, nn.Module]:
    """The projectors that an adapter with this config sits at, by place."""
    found = {MAIN_PLACE: family.projector(inner)}
    if config.align_deepstack:
        further = family.deepstack_projectors(inner)
        found |= {f"deepstack.{number}.": projector for number, projector in enumerate(further)}
    return found


def is_aligned(config: EmmaConfig, projector: nn.Module) -> bool:
    """False at a deepstack projector where only other adapters of the model sit."""
    place: str = getattr(projector, PLACE_ATTRIBUTE)
    return place == MAIN_PLACE or config.align_deepstack


def submodule_name(adapter: str) -> str:
    """Name of an adapter's alignment as a submodule of its projector."""
    return "emma" if adapter == DEFAULT else f"emma_{adapter}"


def own_projector_name(adapter: str) -> str:
    # No adapter can be called so.
    return f"{submodule_name(adapter)}-projector"


def mark(projector: nn.Module, place: str, state: object) -> None:
    """Make a projector one that adapters sit at."""
    setattr(projector, STATE_ATTRIBUTE, state)
    setattr(projector, PLACE_ATTRIBUTE, place)


def check_unshared(*modules: nn.Module, state: object = None) -> None:
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


def attach(projector: nn.Module, adapter: str, module: EmmaAlignment | OwnProjector) -> None:
    """Put a module of an adapter on a projector."""
    is_own = isinstance(module, OwnProjector)
    _holder(projector).add_module(own_projector_name(adapter) if is_own else submodule_name(adapter), module)


def _holder(projector: nn.Module) -> nn.Module:
    holder = projector
    while isinstance(holder, nn.Sequential):
        # It would run the alignment as one of its layers; a layer's own submodules it leaves alone.
        holder = next(iter(holder.children()))
    return holder


def detach(module: nn.Module) -> None:
    """Take off what :func:`mark` and :func:`attach` put on a projector, or patching on another module."""
    if PLACE_ATTRIBUTE in module.__dict__:
        delattr(module, PLACE_ATTRIBUTE)
        for holder in list(module.modules()):
            ours = [n for n, child in holder._modules.items() if isinstance(child, (EmmaAlignment, OwnProjector))]
            for name in ours:
                delattr(holder, name)
    delattr(module, STATE_ATTRIBUTE)


def remove(projector: nn.Module, adapter: str) -> None:
    """Take one adapter off a projector."""
    _remove(projector, submodule_name(adapter), EmmaAlignment)
    remove_own_projector(projector, adapter)


def remove_own_projector(projector: nn.Module, adapter: str) -> None:
    """Take an adapter's own copy off a projector, if it has one."""
    _remove(projector, own_projector_name(adapter), OwnProjector)


def _remove(projector: nn.Module, name: str, kind: type[nn.Module]) -> None:
    for holder in list(projector.modules()):
        if isinstance(holder._modules.get(name), kind):
            delattr(holder, name)


def alignment_at(projector: nn.Module, adapter: str) -> EmmaAlignment:
    """An adapter's alignment at a projector, also at one that another tool has wrapped.

    Raises:
        PatchError: if another tool has replaced the part of the projector that held it.
    """
    alignment = _found_at(projector, submodule_name(adapter))
    if isinstance(alignment, EmmaAlignment):
        return alignment
    raise PatchError(
        f"a part of the projector, a {type(projector).__name__}, was replaced after patch_model, and the adapter is "
        "gone with it: change the model first, then patch it and load_adapter"
    )


def own_projector_at(projector: nn.Module, adapter: str) -> OwnProjector | None:
    """The copy of a projector that an adapter was trained with; None if it goes through the model's."""
    own = _found_at(projector, own_projector_name(adapter))
    return own if isinstance(own, OwnProjector) else None


def _found_at(projector: nn.Module, name: str) -> Any:
    module: Any = projector
    while module is not None:
        if (found := getattr(module, name, None)) is not None:
            return found
        wrapped = getattr(module, "base_layer", None)
        module = getattr(module, "0", None) if wrapped is None else wrapped
    return None


def projector_parameters(projector: nn.Module) -> dict[str, nn.Parameter]:
    """A projector's own parameters by name, without the adapters'."""
    own = projector_tensors(projector)
    return {name: parameter for name, parameter in projector.named_parameters() if name in own}


def projector_tensors(projector: nn.Module) -> dict[str, Tensor]:
    """A projector's own parameters and buffers by name, without the adapters'."""
    adapter = {
        id(tensor)
        for module in projector.modules()
        if isinstance(module, (EmmaAlignment, OwnProjector))
        for tensor in (*module.parameters(), *module.buffers())
    }
    tensors = {**dict(projector.named_parameters()), **dict(projector.named_buffers())}
    return {name: tensor for name, tensor in tensors.items() if id(tensor) not in adapter}
