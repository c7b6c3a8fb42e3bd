"""The projectors of a patched model: its own, and the copies that are trained with adapters."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping

from torch import Tensor, nn

from ..errors import PatchError
from ..modules import private
from ..modules.sharding import is_fully_sharded
from . import sites
from .attached_adapter import AttachedAdapter
from .hooks import remove_hooks
from .own_projector import OwnProjector
from .state import AdapterState

#: Parts of a parameter's name that show that PEFT has wrapped it.
_WRAPPERS = re.compile(r"(?<![^.])(base_layer|original_module|modules_to_save\.[^.]+)\.")


def is_wrapped(adapter: AttachedAdapter) -> bool:
    """Return whether PEFT has put weights of its own around those of a projector that the adapter sits at."""
    return any(_WRAPPERS.search(name) for site in adapter.sites().values() for name, _ in site.named_parameters())


def give_own_projectors(state: AdapterState, adapter: AttachedAdapter) -> None:
    """Give an adapter copies of the model's projectors, trainable where those are.

    Does nothing if the adapter has them already.

    Raises:
        PatchError: if the projectors can't be copied, because they are sharded or offloaded.
    """
    if adapter.own_projectors():
        return
    if is_fully_sharded(state.model):
        raise PatchError(
            "FSDP has sharded the projector, of which the adapter gets a copy: train_only(projector=True) first, then "
            "shard"
        )
    copies = {place: _copy_of(projector) for place, projector in adapter.sites().items()}
    for place, projector in adapter.sites().items():
        sites.attach(projector, adapter.name, copies[place])


def _copy_of(projector: nn.Module) -> OwnProjector:
    if any(parameter.is_meta for parameter in sites.projector_parameters(projector).values()):
        raise PatchError(
            "the projector, of which the adapter gets a copy, is offloaded: train_only(projector=True) first, then "
            "dispatch the model"
        )
    projector = copy.deepcopy(projector)
    remove_hooks(projector)
    sites.detach(projector)
    private.remove_replaced_forwards(projector)
    return OwnProjector(projector)


def assign(
    state: AdapterState, adapter: AttachedAdapter, alignment: Mapping[str, Tensor], projector: Mapping[str, Tensor]
) -> None:
    """Give an adapter these values, and projectors of its own if ``projector`` has values for them.

    The alignments take the values' dtype too: they are saved as they were used.
    """
    targets = adapter.state_dict(keep_vars=True)
    # Whatever allocates memory comes before the first change, so that a failure changes nothing.
    alignment = {name: value.to(targets[name].device) for name, value in alignment.items()}
    if projector:
        give_own_projectors(state, adapter)
    parameters = adapter.projector_parameters()
    # Without values for them, own projectors go back to the model's values.
    values = projector or {
        place + name: parameter
        for place, site in adapter.sites().items()
        for name, parameter in sites.projector_parameters(site).items()
    }
    values = {name: values[name].detach().to(p.device, p.dtype) for name, p in parameters.items()}
    for name, parameter in parameters.items():
        parameter.data.copy_(values[name])
    for name, value in alignment.items():
        targets[name].data = value
