"""Model families: the contract one fulfils, and the registry that finds it by ``config.model_type``.

A family is stateless: it only knows where things are in its models. Register one with ``register_family``, or
from a package of your own through the entry-point group ``emma_adapter.integrations``: the entry's name is the
model type, its value the class.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar

from torch import Tensor, nn

from .errors import UnsupportedModelError

ENTRY_POINT_GROUP = "emma_adapter.integrations"


@dataclass(frozen=True)
class MediaLayout:
    """How the first argument of a projector call divides into media (images or videos), in order."""

    #: Tokens that each medium takes in the language model.
    tokens: Sequence[int]
    #: Entries of the projector's first argument that belong to each medium: along its first dimension, or
    #: visual tokens if it is ``packed``.
    units: Sequence[int]
    #: True if all media stand one after another in one sequence ``[1, sum(units), D]``.
    packed: bool = False
    #: ``(height, width)`` of each packed medium in visual tokens.
    grids: Sequence[tuple[int, int]] | None = None


class ModelFamily(ABC):
    """Where the vision features of a family of models meet their projector."""

    #: The ``config.model_type`` values this family is for.
    model_types: ClassVar[tuple[str, ...]]
    #: For each modality, the arguments of a call that hold its pixels.
    pixel_arguments: ClassVar[Mapping[str, tuple[str, ...]]] = {"image": ("pixel_values",)}
    #: Arguments of a call that ``layout`` needs: sizes only, never pixels, because they are kept for the call.
    size_arguments: ClassVar[tuple[str, ...]] = ()

    def inner(self, model: nn.Module) -> nn.Module:
        """The module whose ``forward`` takes pixels and token ids, inside the one with the language-model head."""
        inner = getattr(model, "model", None)
        if not isinstance(inner, nn.Module):
            raise UnsupportedModelError(
                f"{type(model).__name__} has no inner model at .model: pass the ...ForConditionalGeneration model "
                "(and get_base_model() of a PeftModel)"
            )
        return inner

    @abstractmethod
    def projector(self, inner: nn.Module) -> nn.Module:
        """The module between vision features and language model; its first argument is what EMMA aligns."""

    @abstractmethod
    def visual_dim(self, inner: nn.Module) -> int:
        """Channels of a visual token before the projector."""

    def visual_size(self, inner: nn.Module) -> tuple[int | None, tuple[int, int] | None]:
        """``(N, (height, width))`` of an image in visual tokens: what learned positions are made for. N is None
        where a model has no native size; the grid is None where the tokens don't form one."""
        return None, None

    def has_fixed_size(self, inner: nn.Module) -> bool:
        """True if every image becomes the same number of visual tokens."""
        return True

    @abstractmethod
    def placeholder_id(self, inner: nn.Module, modality: str) -> int:
        """The token id that stands for visual tokens of this modality in ``input_ids``."""

    @abstractmethod
    def layout(
        self, inner: nn.Module, modality: str, visual_tokens: Tensor, sizes: Mapping[str, Any], placeholders: int
    ) -> MediaLayout:
        """How ``visual_tokens``, the projector's first argument, divides into media.

        ``sizes`` are the call's ``size_arguments``, ``placeholders`` the placeholder tokens in the whole call.

        Raises:
            RoutingError: if they don't fit together.
        """


_FAMILIES: dict[str, ModelFamily] = {}


def register_family(family: ModelFamily) -> ModelFamily:
    """Make a family known under its ``model_types``; it replaces one found through an entry point."""
    for model_type in family.model_types:
        _FAMILIES[model_type] = family
    return family


def family_names() -> tuple[str, ...]:
    """Every supported ``config.model_type``, without importing the families."""
    return tuple(sorted({*_FAMILIES, *_advertised()}))


def find_family(model: Any) -> ModelFamily:
    """The family of a model.

    Raises:
        UnsupportedModelError: if there is none for its ``config.model_type``, or its package can't be imported.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no config.model_type: pass the transformers model itself, not a wrapper "
            "around it (DistributedDataParallel's is .module)"
        )
    if model_type not in _FAMILIES:
        entry = _advertised().get(model_type)
        if entry is None:
            raise UnsupportedModelError(
                f"model_type {model_type!r} is not supported; supported are {list(family_names())}. To add it, "
                "subclass emma_adapter.ModelFamily and call emma_adapter.register_family(YourFamily())"
            )
        _FAMILIES[model_type] = _load(entry)
    return _FAMILIES[model_type]


def _advertised() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=ENTRY_POINT_GROUP)}


def _load(entry: EntryPoint) -> ModelFamily:
    try:
        family: ModelFamily = entry.load()()
    except Exception as error:
        package = entry.dist.name if entry.dist is not None else "unknown"
        raise UnsupportedModelError(
            f"the integration {entry.value!r} for model_type {entry.name!r} (package {package}) can't be loaded: "
            f"{type(error).__name__}: {error}"
        ) from error
    return family
