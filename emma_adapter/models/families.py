"""The contract of a model family: where its vision features enter the language model, and how they divide into images.

A family is stateless: it only describes how its models are built. ``registry.py`` finds the family of a model.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ..errors import RoutingError, UnsupportedModelError

#: Parts of names that modules between a vision tower and a language model have.
_PROJECTOR_NAME = re.compile(r"(proj|merger|connector|adapter|embed_vision|multi_modal|mlp1)[^.]*$")

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
    #: How many calls of this projector came before this one in the same pass, if their layouts ``continue``.
    number: int = 0

    def size(self, name: str) -> Any:
        """Return a size argument of the call.

        Raises:
            RoutingError: if it was not passed.
        """
        value = self.sizes.get(name)
        if value is None:
            raise RoutingError(
                f"{type(self.inner).__name__} was given pixels without {name}=, by which its family divides them into "
                f"{self.modality}s: pass on everything that the model's processor returns (to the author of the "
                f"family: is {name} an argument of forward, or of the method that encodes {self.modality}s?)"
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
    #: True if the projector is called several times in a pass, and the media of this call follow those of the calls
    #: before, as in models that project one image at a time.
    continues: bool = False
    #: The row of the batch that each medium belongs to, where the projector's input says so itself, as one that is
    #: padded to as many images in each row. Left out, media fill the prompts' placeholders in order.
    rows: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.grids is not None:
            # ``tensor.tolist()`` gives lists.
            object.__setattr__(self, "grids", [(int(height), int(width)) for height, width in self.grids])


class ModelFamily(ABC):
    """Describes where the vision features of a family of models enter their projector.

    The defaults fit models whose images (or tiles) are the rows of the projector's input, ``[images, N, D]``, and whose
    prompts hold one placeholder for each token that the projector returns.
    """

    #: The ``config.model_type`` values this family is for.
    model_types: ClassVar[tuple[str, ...]]
    #: Path of the projector from the inner model. EMMA aligns its first floating-point tensor, ``[rows, N, D]`` or any
    #: packed shape, channels last. The path may lead inside a larger projector, to the part that gets such a tensor.
    #: Calls without a floating-point tensor pass by untouched, as of a module that also embeds token ids.
    projector_path: ClassVar[str] = "multi_modal_projector"
    #: ``"image"``, ``"video"``, or both.
    modalities: ClassVar[tuple[str, ...]] = ("image",)
    #: For each modality, the argument of a call that holds its pixels.
    pixel_arguments: ClassVar[Mapping[str, str]] = {"image": "pixel_values", "video": "pixel_values_videos"}
    #: For each modality, the method of the inner model that encodes it. Where there is none, pixels are of the first
    #: modality.
    feature_methods: ClassVar[Mapping[str, str]] = {"image": "get_image_features", "video": "get_video_features"}
    #: Arguments of a call that ``layout`` needs: sizes only, never pixels, because they stay alive during the call.
    #: They are those of the feature method, or of ``forward`` where that doesn't hand them on.
    size_arguments: ClassVar[tuple[str, ...]] = ()
    #: True if an image may be cut into several tiles.
    tiles: ClassVar[bool] = False
    #: Why nothing can be aligned, and no latents of pictures added, behind the projector; empty if they can. It may put
    #: out no tokens of the language model yet, for example.
    cannot_align_projected: ClassVar[str] = ""
    #: Why models of this family can't draw, though their language model could; empty if they can.
    cannot_draw: ClassVar[str] = ""
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
        """Return the module between vision features and language model; EMMA aligns its first tensor.

        Raises:
            UnsupportedModelError: if there is no module at ``projector_path``.
        """
        try:
            return inner.get_submodule(self.projector_path)
        except AttributeError as error:
            similar = [
                name for name, _ in inner.named_modules() if _PROJECTOR_NAME.search(name) and "layers." not in name
            ]
            raise UnsupportedModelError(
                f"{type(inner).__name__} has no module {self.projector_path!r}, where {type(self).__name__}"
                f".projector_path says that the projector is; by their names, it could be one of {similar[:8]}"
            ) from error

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

    def tower_merge(self, inner: nn.Module) -> int:
        """Return the side of the square of tokens that the vision tower merges into one at its end; 1 if none.

        Vision experts route the tokens before that.
        """
        return 1

    def placeholder_id(self, inner: nn.Module, modality: str) -> int:
        """Return the token id that stands for visual tokens of this modality in ``input_ids``.

        Raises:
            UnsupportedModelError: if the config doesn't say: another method of the family must.
        """
        name = f"{modality}_token_id"
        token_id = getattr(inner.config, name, None)
        if token_id is None:
            raise UnsupportedModelError(
                f"{type(inner.config).__name__} has no {name}: override {type(self).__name__}.placeholder_id to return "
                f"the token that stands for a visual token of {'an' if modality[0] in 'aeiou' else 'a'} {modality}"
            )
        return int(token_id)

    def placeholders(self, inner: nn.Module, input_ids: Tensor) -> dict[str, Tensor]:
        """Return where the placeholder tokens of each modality are, bool ``[B, L]``.

        Override it where images and videos share a token, and other tokens around them tell which is which.
        """
        return {modality: input_ids == self.placeholder_id(inner, modality) for modality in self.modalities}

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
