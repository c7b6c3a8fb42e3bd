"""Model families: the interface they implement, and the registry that finds one by ``config.model_type``.

A family is stateless: it only describes how its models are built. Register one with ``register_family``, or
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

from ..errors import RoutingError, UnsupportedModelError

ENTRY_POINT_GROUP = "emma_adapter.integrations"

#: ``(top, left, bottom, right)`` as fractions of an image's height and width.
Box = tuple[float, float, float, float]
WHOLE_IMAGE: Box = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class ProjectorCall:
    """One call of a projector, with all that the division of its input into media can depend on."""

    #: The module whose ``forward`` takes pixels and token ids.
    inner: nn.Module
    #: ``"image"`` or ``"video"``.
    modality: str
    #: The projector's first argument.
    visual_tokens: Tensor
    #: The call's ``size_arguments``; those that were not passed are None.
    sizes: Mapping[str, Any]
    #: Shape of this modality's pixels; a tuple of shapes if they are a list of tensors.
    pixel_shape: tuple[Any, ...] | None
    #: Number of this modality's placeholder tokens in each row, ``[B]``; None without a prompt to count them in.
    placeholders: Tensor | None

    def size(self, name: str) -> Any:
        """Return a size argument of the call.

        Raises:
            RoutingError: if it was not passed.
        """
        value = self.sizes.get(name)
        if value is None:
            raise RoutingError(
                f"{type(self.inner).__name__} was given pixels without {name}=, which says how large its images are: "
                "pass on everything that the model's processor returns"
            )
        return value


@dataclass(frozen=True)
class MediaLayout:
    """The division of a projector call's first argument into media (images or videos), in order."""

    #: Number of tokens of each medium in the language model; 0 for a medium that no prompt shows.
    tokens: Sequence[int]
    #: Number of entries (tiles, frames or whole images) of each medium. Unless ``packed``, an entry is a row of the
    #: projector's input.
    entries: Sequence[int]
    #: ``(height, width)`` of each entry in visual tokens. None if all have the model's native size.
    grids: Sequence[tuple[int, int]] | None = None
    #: True if all entries follow one another in one sequence, ``[sum(N), D]`` or ``[1, sum(N), D]``. Needs
    #: ``grids``.
    packed: bool = False
    #: For tokens that don't come row by row: for each grid, ``[N]``, the place ``y * width + x`` of each token.
    orders: Mapping[tuple[int, int], Tensor] | None = None
    #: True if ``tokens`` divide up the prompt's placeholders. The projector must then return as many: a difference is
    #: the only sign that the prompt holds placeholders of images outside this call.
    tokens_from_prompt: bool = False


class ModelFamily(ABC):
    """Describes where the vision features of a family of models enter their projector.

    The defaults fit models whose images (or tiles) are the rows of the projector's input, ``[images, N, D]``, and whose
    prompts hold one placeholder for each token that the projector returns.
    """

    #: The ``config.model_type`` values this family is for.
    model_types: ClassVar[tuple[str, ...]]
    #: Path of the projector from the inner model. Its first argument is what EMMA aligns.
    projector_path: ClassVar[str] = "multi_modal_projector"
    #: ``"image"``, ``"video"``, or both.
    modalities: ClassVar[tuple[str, ...]] = ("image",)
    #: For each modality, the argument of a call that holds its pixels.
    pixel_arguments: ClassVar[Mapping[str, str]] = {"image": "pixel_values", "video": "pixel_values_videos"}
    #: For each modality, the method of the inner model that encodes it. Where there is none, pixels are of the first
    #: modality.
    feature_methods: ClassVar[Mapping[str, str]] = {"image": "get_image_features", "video": "get_video_features"}
    #: Arguments of a call that ``layout`` needs: sizes only, never pixels, because they stay alive during the call.
    size_arguments: ClassVar[tuple[str, ...]] = ()
    #: True if an image may be cut into several tiles.
    tiles: ClassVar[bool] = False
    #: True if the vision tower works on images padded to one length, ``[entries, N, D]``, and takes the padding off at
    #: its end: vision experts route whole rows of it.
    pads_images: ClassVar[bool] = False

    def for_model(self, model: nn.Module) -> ModelFamily:
        """Return the family to use for this model: another one, where different classes share a model type."""
        return self

    def inner(self, model: nn.Module) -> nn.Module:
        """Return the module, inside the one with the language-model head, whose ``forward`` takes pixels and ids."""
        inner = getattr(model, "model", None)
        if not isinstance(inner, nn.Module):
            raise UnsupportedModelError(
                f"{type(model).__name__} has no inner model at .model: pass the ...ForConditionalGeneration model "
                "(and get_base_model() of a PeftModel)"
            )
        return inner

    def projector(self, inner: nn.Module) -> nn.Module:
        """Return the module between vision features and language model; EMMA aligns its first argument."""
        return inner.get_submodule(self.projector_path)

    def deepstack_projectors(self, inner: nn.Module) -> Sequence[nn.Module]:
        """Return further projectors, for features of lower vision layers that enter the language model separately."""
        return ()

    @abstractmethod
    def visual_dim(self, inner: nn.Module) -> int:
        """Return the number of channels of a visual token before the projector."""

    def visual_size(self, inner: nn.Module) -> tuple[int | None, tuple[int, int] | None]:
        """Return ``(N, (height, width))`` of an entry in visual tokens, for which learned positions are made.

        N is None where a model has no native size; the grid is None where the tokens don't form one.
        """
        return None, None

    def has_fixed_size(self, inner: nn.Module) -> bool:
        """Return whether every entry has the same number of visual tokens."""
        return True

    def projector_merge(self, inner: nn.Module) -> int:
        """Return the side of the square of visual tokens that the projector merges into one; 1 if it merges none."""
        return 1

    def placeholder_id(self, inner: nn.Module, modality: str) -> int:
        """Return the token id that stands for visual tokens of this modality in ``input_ids``."""
        return int(getattr(inner.config, f"{modality}_token_id"))

    def layout(self, call: ProjectorCall) -> MediaLayout:
        """Return how ``call.visual_tokens`` divides into media.

        Raises:
            RoutingError: if sizes, visual tokens and placeholders don't agree.
        """
        entries = call.visual_tokens.shape[0]
        from_prompt = call.placeholders is not None
        return MediaLayout(tokens=share_evenly(call, entries), entries=[1] * entries, tokens_from_prompt=from_prompt)

    def boxes(self, call: ProjectorCall, layout: MediaLayout) -> Sequence[Box | None]:
        """Return where each entry of ``layout`` lies in its image or frame; None where the call doesn't tell.

        The heat maps of ``emma_adapter.analysis`` use it. A tile may extend beyond its image, where it is padded.
        """
        box = None if self.tiles and call.modality == "image" else WHOLE_IMAGE
        return [box] * sum(layout.entries)


def share_evenly(call: ProjectorCall, media: int) -> list[int]:
    """Divide the placeholders evenly among the media, which is right even if a projector pools.

    Raises:
        RoutingError: if they can't be divided evenly.
    """
    if call.placeholders is None:
        return [1] * media
    total = int(call.placeholders.sum())
    if media == 0 or total == 0 or total % media:
        raise RoutingError(
            f"{mismatch(call.modality, total, call.visual_tokens.shape[:-1].numel())}: {media} {call.modality}s can't "
            f"share {total} placeholder tokens evenly. Let the model's processor make text and images together, and "
            "let nothing cut them off (max_length, truncation)"
        )
    return [total // media] * media


def mismatch(modality: str, tokens: int, features: int) -> str:
    """Return transformers' message for features and placeholder tokens that differ in number.

    TRL's trainers recognize a ``max_length`` that is too short by it.
    """
    kind = modality.capitalize()
    return f"{kind} features and {modality} tokens do not match, tokens: {tokens}, features: {features}"


_FAMILIES: dict[str, ModelFamily] = {}


def register_family(family: ModelFamily) -> ModelFamily:
    """Register a family under its ``model_types``, in place of any other, and return it.

    Raises:
        UnsupportedModelError: if it isn't an instance of :class:`ModelFamily`, but a class, for example.
    """
    if not isinstance(family, ModelFamily):
        raise UnsupportedModelError(
            "register_family takes an instance of a subclass of emma_adapter.ModelFamily: "
            f"register_family(YourFamily()); got {family if isinstance(family, type) else type(family)}"
        )
    for model_type in family.model_types:
        _FAMILIES[model_type] = family
    return family


def family_names() -> tuple[str, ...]:
    """Return every supported ``config.model_type``, without importing the families."""
    return tuple(sorted({*_FAMILIES, *_advertised()}))


def require_model(model: Any) -> None:
    """Check that ``model`` is a model.

    Raises:
        UnsupportedModelError: if it isn't, but a model's name, for example.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"a model is needed, as AutoModelForImageTextToText.from_pretrained(…) returns it; got a "
            f"{type(model).__name__} (the model of a handle is adapter.model)"
        )


def find_family(model: Any) -> ModelFamily:
    """Return the family of a model.

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
    return _FAMILIES[model_type].for_model(model)


def _advertised() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=ENTRY_POINT_GROUP)}


def _load(entry: EntryPoint) -> ModelFamily:
    try:
        family: ModelFamily = entry.load()()
    except Exception as error:
        package = entry.dist.name if entry.dist is not None else "unknown"
        raise UnsupportedModelError(
            f"the integration {entry.value!r} for model_type {entry.name!r} (package {package}) can't be loaded "
            f"({type(error).__name__}: {error}): install what it needs, or a release of it that fits this environment"
        ) from error
    return family
