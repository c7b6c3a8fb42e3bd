"""An adapter of a patched model: its name, config and instruction pipeline, and the way to its modules."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from ..alignment.config import EmmaConfig
from ..alignment.module import EmmaAlignment
from ..instructions.pipeline import InstructionPipeline
from ..models.families import ModelFamily
from . import sites
from .own_projector import OwnProjector


class PatchedModel(Protocol):
    """What an adapter has to know of the model it is attached to."""

    family: ModelFamily

    @property
    def model(self) -> nn.Module: ...


class AttachedAdapter:
    """One adapter of a patched model.

    Its modules are part of the model and are looked up there each time, because other tools replace and copy parts of
    models.
    """

    def __init__(self, patched: PatchedModel, name: str, config: EmmaConfig, pipeline: InstructionPipeline) -> None:
        self._patched = patched
        self.name = name
        self.config = config
        self.pipeline = pipeline

    def sites(self) -> dict[str, nn.Module]:
        """Return the model's projectors that the adapter sits at, by place."""
        family = self._patched.family
        return sites.places(family, self.config, family.inner(self._patched.model))

    def alignments(self) -> dict[str, EmmaAlignment]:
        """Return the adapter's modules, by place."""
        return {place: sites.alignment_at(projector, self.name) for place, projector in self.sites().items()}

    def own_projectors(self) -> dict[str, OwnProjector]:
        """Return the projectors trained with the adapter, by place; empty if it goes through the model's."""
        copies = {place: sites.own_projector_at(projector, self.name) for place, projector in self.sites().items()}
        return {place: own_projector for place, own_projector in copies.items() if own_projector is not None}

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Return the alignments' parameters, by name in the adapter."""
        return {
            place + name: parameter
            for place, alignment in self.alignments().items()
            for name, parameter in alignment.named_parameters()
        }

    def projector_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters of the adapter's own projectors, by place and name in the projector."""
        return {
            place + name: parameter
            for place, own_projector in self.own_projectors().items()
            for name, parameter in own_projector.projector.named_parameters()
        }

    def parameters(self) -> list[nn.Parameter]:
        """Return all parameters of the adapter, its own projectors' included."""
        return [*self.named_parameters().values(), *self.projector_parameters().values()]

    def state_dict(self, *, keep_vars: bool = False) -> dict[str, Tensor]:
        """Return the alignments' tensors, by name in the adapter."""
        return {
            place + name: tensor
            for place, alignment in self.alignments().items()
            for name, tensor in alignment.state_dict(keep_vars=keep_vars).items()
        }

    def requires_grad_(self, trainable: bool) -> None:
        """Make all parameters trainable, or freeze them."""
        for parameter in self.parameters():
            parameter.requires_grad_(trainable)
