"""LLaVA's original classes (github.com/haotian-liu/LLaVA and forks): a ``mm_projector``, one placeholder per image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import nn

from emma_adapter import MediaLayout, ModelFamily, ProjectorCall, RoutingError
from emma_adapter.models.families import WHOLE_IMAGE, Box

_IMAGE_TOKEN_INDEX = -200


class LlavaOriginalFamily(ModelFamily):
    """Features ``[tiles, N, D]``; the one placeholder of an image grows to its visual tokens afterwards.

    Rows without a placeholder take an image too, which their prompt doesn't show.
    """

    model_types = ("llava_llama", "llava_mistral", "llava_qwen")
    projector_path = "model.mm_projector"
    pixel_arguments: ClassVar[Mapping[str, str]] = {"image": "images"}
    tiles = True

    def inner(self, model: nn.Module) -> nn.Module:
        # The model with the language-model head takes the images.
        return model

    def visual_dim(self, inner: nn.Module) -> int:
        config: Any = inner.config
        return int(config.mm_hidden_size)

    def visual_size(self, inner: nn.Module) -> tuple[int | None, tuple[int, int] | None]:
        tower: Any = inner.get_vision_tower()  # type: ignore[operator]
        number = getattr(tower, "num_patches", None)
        if number is None:
            return None, None
        if getattr(tower, "select_feature", "patch") == "cls_patch":
            return int(number) + 1, None
        side = round(number**0.5)
        return int(number), (side, side) if side * side == number else None

    def placeholder_id(self, inner: nn.Module, modality: str) -> int:
        return _IMAGE_TOKEN_INDEX

    def layout(self, call: ProjectorCall) -> MediaLayout:
        tiles = _tiles_of(call)
        if call.placeholders is None:
            return MediaLayout(tokens=[1] * len(tiles), entries=tiles)
        tokens: list[int] = []
        for placeholders in call.placeholders.tolist():
            tokens += [1] * placeholders or [0]
        if len(tokens) > len(tiles) and not any(tokens[len(tiles) :]):
            # Some forks leave out the unseen images of the last rows.
            tokens = tokens[: len(tiles)]
        if len(tokens) != len(tiles):
            raise RoutingError(
                f"{len(tiles)} images for placeholders {call.placeholders.tolist()} per row: LLaVA takes one image for "
                "each placeholder, and one for each row without"
            )
        return MediaLayout(tokens=tokens, entries=tiles)

    def boxes(self, call: ProjectorCall, layout: MediaLayout) -> Sequence[Box | None]:
        # The call doesn't tell how a fork arranges the tiles of an image.
        return [WHOLE_IMAGE if entries == 1 else None for entries in layout.entries for _ in range(entries)]


def _tiles_of(call: ProjectorCall) -> Sequence[int]:
    """Return the number of tiles of each image.

    Images come as one tensor, ``[images, C, H, W]`` or ``[images, tiles, C, H, W]``, or as a list of ``[C, H, W]`` or
    ``[tiles, C, H, W]``.
    """
    shape = call.pixel_shape
    if not shape:
        return [1] * call.visual_tokens.shape[0]
    if isinstance(shape[0], tuple):
        return [1 if len(image) == 3 else image[0] for image in shape]
    return [1 if len(shape) == 4 else shape[1]] * shape[0]
