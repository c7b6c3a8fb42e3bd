"""LLaVA-NeXT and LLaVA-NeXT-Video: images cut into tiles, and videos whose frames are pooled."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, isqrt
from typing import Any

import torch

from emma_adapter import MediaLayout, ProjectorCall, RoutingError
from emma_adapter.models.families import WHOLE_IMAGE, Box

from .llava import LlavaFamily


class LlavaNextFamily(LlavaFamily):
    """Features ``[tiles, N, D]``; each image begins with the whole picture, and its tiles follow."""

    model_types = ("llava_next",)
    size_arguments = ("image_sizes", "vision_feature_select_strategy")
    tiles = True

    def layout(self, call: ProjectorCall) -> MediaLayout:
        config: Any = call.inner.config
        strategy = call.sizes["vision_feature_select_strategy"] or config.vision_feature_select_strategy
        tiles = tiles_of(call)
        return MediaLayout(tokens=packed_lengths(call, tiles, vision_feature_select_strategy=strategy), entries=tiles)

    def boxes(self, call: ProjectorCall, layout: MediaLayout) -> Sequence[Box | None]:
        return tile_boxes(call, layout)


class LlavaNextVideoFamily(LlavaNextFamily):
    """As LLaVA-NeXT, and videos: frames ``[videos * T, N / pooling, D]``, pooled before they are projected."""

    model_types = ("llava_next_video",)
    modalities = ("image", "video")

    def layout(self, call: ProjectorCall) -> MediaLayout:
        if call.modality == "image":
            return super().layout(call)
        videos, frames = frames_of(call)
        per_frame = call.visual_tokens.shape[1]
        side = isqrt(per_frame)
        return MediaLayout(
            tokens=[frames * per_frame] * videos,
            entries=[frames] * videos,
            grids=[(side, side)] * (videos * frames),
        )


def tiles_of(call: ProjectorCall, whole: Sequence[bool] | None = None) -> list[int]:
    """Return how many tiles each image was cut into; ``whole`` is true for images that were not cut."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    config: Any = call.inner.config
    sizes = call.size("image_sizes")
    return [
        1
        if whole is not None and whole[number]
        else int(image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size))
        for number, size in enumerate(sizes)
    ]


def tile_boxes(call: ProjectorCall, layout: MediaLayout) -> list[Box | None]:
    """Return the boxes of each whole image, then of its tiles row by row.

    An image with tiles was enlarged to the best resolution, and padded evenly.
    """
    from transformers.image_processing_utils import select_best_resolution

    if call.modality == "video":
        return [WHOLE_IMAGE] * sum(layout.entries)
    config: Any = call.inner.config
    side = config.vision_config.image_size
    boxes: list[Box | None] = []
    for entries, size in zip(layout.entries, torch.as_tensor(call.size("image_sizes")).tolist(), strict=True):
        boxes.append(WHOLE_IMAGE)
        if entries == 1:
            continue
        padded = select_best_resolution(size, config.image_grid_pinpoints)
        scale = min(padded[0] / size[0], padded[1] / size[1])
        scaled = [min(ceil(length * scale), limit) for length, limit in zip(size, padded, strict=True)]
        margin = [(limit - length) // 2 for limit, length in zip(padded, scaled, strict=True)]
        for y in range(0, padded[0], side):
            for x in range(0, padded[1], side):
                top, left = (y - margin[0]) / scaled[0], (x - margin[1]) / scaled[1]
                boxes.append((top, left, top + side / scaled[0], left + side / scaled[1]))
    return boxes


def packed_lengths(call: ProjectorCall, tiles: Sequence[int], **options: Any) -> list[int]:
    """Return each image's tokens in the language model, by running the model's own packing on meta tensors."""
    inner: Any = call.inner
    per_tile = call.visual_tokens.shape[1]
    features = [torch.empty(number, per_tile, 1, device="meta") for number in tiles]
    newline = torch.empty(1, device="meta")
    packed, _ = inner.pack_image_features(features, call.size("image_sizes"), image_newline=newline, **options)
    return [len(image) for image in packed]


def frames_of(call: ProjectorCall) -> tuple[int, int]:
    """Return the number of videos, and of frames of each."""
    if call.pixel_shape is None or len(call.pixel_shape) != 5:
        raise RoutingError(
            f"videos must come as one tensor [videos, frames, channels, height, width]; got {call.pixel_shape}"
        )
    return call.pixel_shape[0], call.pixel_shape[1]
