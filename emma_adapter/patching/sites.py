"""The sites of adapters in a model: its projector and, if the config says so, each deepstack projector."""

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
#: Attribute of a projector that says which of the model's projectors it is.
PLACE_ATTRIBUTE = "_emma_place"
#: Place of the main projector; others are "deepstack.0." and so on. Names of saved tensors begin with the place.
MAIN_PLACE = ""
DEEPSTACK_PLACE = re.compile(r"deepstack\.\d+\.")


def places(family: ModelFamily, config: EmmaConfig, inner: nn.Module) -> dict[str, nn.Module]:
    """Return the projectors that an adapter with this config sits at, by place."""
    projectors = {MAIN_PLACE: family.projector(inner)}
    if config.align_deepstack:
        deepstack = family.deepstack_projectors(inner)
        projectors |= {f"deepstack.{number}.": projector for number, projector in enumerate(deepstack)}
    return projectors


def is_aligned(config: EmmaConfig, projector: nn.Module) -> bool:
    """Return False at a deepstack projector that only other adapters of the model align."""
    place: str = getattr(projector, PLACE_ATTRIBUTE)
    return place == MAIN_PLACE or config.align_deepstack


def submodule_name(adapter: str) -> str:
    """Return the name of an adapter's alignment as a submodule of its projector."""
    return "emma" if adapter == DEFAULT else f"emma_{adapter}"


def own_projector_name(adapter: str) -> str:
    # No alignment can have this name: adapters' names are identifiers.
    return f"{submodule_name(adapter)}-projector"


def mark(projector: nn.Module, place: str, state: object) -> None:
    """Mark a projector as one that adapters sit at."""
    setattr(projector, STATE_ATTRIBUTE, state)
    setattr(projector, PLACE_ATTRIBUTE, place)


def check_unshared(*modules: nn.Module, state: object = None) -> None:
    """Check that modules of a model, to be patched or patched with this state, aren't part of another patched model.

    Hooks find their adapter through the module that they run on.

    Raises:
        PatchError: if one of them is.
    """
    for module in modules:
        if getattr(module, STATE_ATTRIBUTE, state) is not state:
            raise PatchError(
                f"the model shares its {type(module).__name__} with another model that is patched, and both would go "
                "through one adapter: give this one a copy (copy.deepcopy) made before the other was patched, or "
                "unpatch_model the other first"
            )


def attach(projector: nn.Module, adapter: str, module: EmmaAlignment | OwnProjector) -> None:
    """Attach a module of an adapter to a projector."""
    is_own = isinstance(module, OwnProjector)
    _holder(projector).add_module(own_projector_name(adapter) if is_own else submodule_name(adapter), module)


def _holder(projector: nn.Module) -> nn.Module:
    holder = projector
    while isinstance(holder, nn.Sequential):
        # A Sequential would run the alignment as one of its layers, but not as a submodule of a layer.
        holder = next(iter(holder.children()))
    return holder


def detach(module: nn.Module) -> None:
    """Take off what :func:`mark` and :func:`attach` put on a projector, or what patching put on another module."""
    if PLACE_ATTRIBUTE in module.__dict__:
        delattr(module, PLACE_ATTRIBUTE)
        for holder in list(module.modules()):
            names = [n for n, child in holder._modules.items() if isinstance(child, (EmmaAlignment, OwnProjector))]
            for name in names:
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
    """Return an adapter's alignment at a projector, even if another tool has wrapped the projector.

    Raises:
        PatchError: if another tool has replaced the part of the projector that held it.
    """
    alignment = _submodule(projector, submodule_name(adapter))
    if isinstance(alignment, EmmaAlignment):
        return alignment
    raise PatchError(
        f"a part of the projector, a {type(projector).__name__}, was replaced after patch_model, and the adapter is "
        "gone with it: change the model first, then patch it and load_adapter"
    )


def own_projector_at(projector: nn.Module, adapter: str) -> OwnProjector | None:
    """Return an adapter's own copy of a projector, or None if the adapter goes through the model's."""
    own_projector = _submodule(projector, own_projector_name(adapter))
    return own_projector if isinstance(own_projector, OwnProjector) else None


def _submodule(projector: nn.Module, name: str) -> Any:
    """Return the submodule of this name, also from inside wrappers and ``nn.Sequential``; None if there is none."""
    module: Any = projector
    while module is not None:
        if (submodule := getattr(module, name, None)) is not None:
            return submodule
        wrapped = getattr(module, "base_layer", None)
        module = getattr(module, "0", None) if wrapped is None else wrapped
    return None


def projector_parameters(projector: nn.Module) -> dict[str, nn.Parameter]:
    """Return a projector's own parameters by name, without the adapters'."""
    tensors = projector_tensors(projector)
    return {name: parameter for name, parameter in projector.named_parameters() if name in tensors}


def projector_tensors(projector: nn.Module) -> dict[str, Tensor]:
    """Return a projector's own parameters and buffers by name, without the adapters'."""
    adapter_tensor_ids = {
        id(tensor)
        for module in projector.modules()
        if isinstance(module, (EmmaAlignment, OwnProjector))
        for tensor in (*module.parameters(), *module.buffers())
    }
    tensors = {**dict(projector.named_parameters()), **dict(projector.named_buffers())}
    return {name: tensor for name, tensor in tensors.items() if id(tensor) not in adapter_tensor_ids}
