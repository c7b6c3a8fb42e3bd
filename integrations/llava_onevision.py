"""LLaVA-OneVision: a single image of a row is cut into tiles, several are not, and videos are pooled afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt
from typing import Any

from emma_adapter import MediaLayout, ProjectorCall
from emma_adapter.models.families import Box

from .llava import LlavaFamily
from .llava_next import frames_of, packed_lengths, tile_boxes, tiles_of


class LlavaOnevisionFamily(LlavaFamily):
    """Features ``[tiles, N, D]`` of images, each beginning with the whole picture; ``[videos * T, N, D]`` of videos."""

    model_types = ("llava_onevision",)
    modalities = ("image", "video")
    size_arguments = ("image_sizes", "batch_num_images", "vision_aspect_ratio")
    tiles = True

    def layout(self, call: ProjectorCall) -> MediaLayout:
        if call.modality == "video":
            return self._video_layout(call)
        config: Any = call.inner.config
        images_per_row = call.sizes["batch_num_images"]
        uncut = None
        if images_per_row is not None:
            uncut = [int(number) > 1 for number in images_per_row for _ in range(int(number))]
        tiles = tiles_of(call, uncut)
        aspect = call.sizes["vision_aspect_ratio"] or config.vision_aspect_ratio
        return MediaLayout(tokens=packed_lengths(call, tiles, vision_aspect_ratio=aspect), entries=tiles)

    def boxes(self, call: ProjectorCall, layout: MediaLayout) -> Sequence[Box | None]:
        return tile_boxes(call, layout)

    def _video_layout(self, call: ProjectorCall) -> MediaLayout:
        videos, frames = frames_of(call)
        # Each frame is halved in both directions, rounding up; one extra token ends the video.
        side = (isqrt(call.visual_tokens.shape[1]) + 1) // 2
        return MediaLayout(tokens=[frames * side**2 + 1] * videos, entries=[frames] * videos)
