"""InternVL, ``InternVLForConditionalGeneration``: images cut into tiles, each with placeholders of its own."""

from __future__ import annotations

from math import isqrt
from typing import Any

from torch import nn

from emma_adapter import MediaLayout, ModelFamily, ProjectorCall


class InternVLFamily(ModelFamily):
    """Features ``[tiles, N, D]`` after the pixel shuffle that makes one visual token of several patches."""

    model_types = ("internvl",)
    tiles = True

    def visual_dim(self, inner: nn.Module) -> int:
        config: Any = inner.config
        return int(config.vision_config.hidden_size / config.downsample_ratio**2)

    def visual_size(self, inner: nn.Module) -> tuple[int | None, tuple[int, int] | None]:
        config: Any = inner.config
        image, patch = config.vision_config.image_size, config.vision_config.patch_size
        height, width = (int(side // edge * config.downsample_ratio) for side, edge in zip(image, patch, strict=True))
        return height * width, (height, width)

    def layout(self, call: ProjectorCall) -> MediaLayout:
        tiles, per_tile = call.visual_tokens.shape[:2]
        # Tiles may be larger than the vision tower was trained on; the pixel shuffle takes squares only.
        grid = (isqrt(per_tile), isqrt(per_tile))
        return MediaLayout(tokens=[per_tile] * tiles, entries=[1] * tiles, grids=[grid] * tiles)
