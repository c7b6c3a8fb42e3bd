"""One of the adapters of a patched model: what it is, and where its modules are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..alignment.config import EmmaConfig
from ..alignment.module import EmmaAlignment
from ..instructions.pipeline import InstructionPipeline
from . import sites
from .own_projector import OwnProjector

if TYPE_CHECKING:
    from .state import AdapterState


class AttachedAdapter:
    """An adapter and its name. Its modules are part of the model, and are looked up there: other tools replace parts of
    models, and copy them."""

    def __init__(self, state: AdapterState, name: str, config: EmmaConfig, pipeline: InstructionPipeline) -> None:
        self._state = state
        self.name = name
        self.config = config
        self.pipeline = pipeline

    def sites(self) -> dict[str, nn.Module]:
        """The model's projectors that the adapter sits at, by place."""
        family = self._state.family
        return sites.places(family, self.config, family.inner(self._state.model))

    def alignments(self) -> dict[str, EmmaAlignment]:
        """The adapter's modules, by place."""
        return {place: sites.alignment_at(projector, self.name) for place, projector in self.sites().items()}

    def own_projectors(self) -> dict[str, OwnProjector]:
        """The projectors that are trained with the adapter, by place; none if it goes through the model's."""
        found = {place: sites.own_projector_at(projector, self.name) for place, projector in self.sites().items()}
        return {place: own for place, own in found.items() if own is not None}

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The alignments' parameters, by their name in the adapter."""
        return {
            place + name: parameter
            for place, alignment in self.alignments().items()
            for name, parameter in alignment.named_parameters()
        }

    def projector_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of its own projectors, by place and name in the projector."""
        return {
            place + name: parameter
            for place, own in self.own_projectors().items()
            for name, parameter in own.projector.named_parameters()
        }

    def parameters(self) -> list[nn.Parameter]:
        """All of them, the projectors' too."""
        return [*self.named_parameters().values(), *self.projector_parameters().values()]

    def state_dict(self, *, keep_vars: bool = False) -> dict[str, Tensor]:
        """The alignments' tensors, by their name in the adapter."""
        return {
            place + name: tensor
            for place, alignment in self.alignments().items()
            for name, tensor in alignment.state_dict(keep_vars=keep_vars).items()
        }

    def requires_grad_(self, trainable: bool) -> None:
        """Train or freeze all parameters."""
        for parameter in self.parameters():
            parameter.requires_grad_(trainable)
