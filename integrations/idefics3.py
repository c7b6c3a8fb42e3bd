"""Idefics3 and SmolVLM: images cut into tiles, each with placeholders of its own; a video's frames are images."""

from __future__ import annotations

from math import isqrt
from typing import Any

from torch import nn

from emma_adapter import MediaLayout, ModelFamily, ProjectorCall


class Idefics3Family(ModelFamily):
    """Features ``[tiles, N, D]``, without the padding images; the pixel shuffle is part of the projector."""

    model_types = ("idefics3", "smolvlm")
    projector_path = "connector"
    tiles = True

    def visual_dim(self, inner: nn.Module) -> int:
        config: Any = inner.config
        return int(config.vision_config.hidden_size)

    def visual_size(self, inner: nn.Module) -> tuple[int | None, tuple[int, int] | None]:
        config: Any = inner.config
        side = config.vision_config.image_size // config.vision_config.patch_size
        return side * side, (side, side)

    def projector_merge(self, inner: nn.Module) -> int:
        config: Any = inner.config
        return int(config.scale_factor)

    def layout(self, call: ProjectorCall) -> MediaLayout:
        tiles, per_tile = call.visual_tokens.shape[:2]
        # Processors may make larger tiles than the vision tower was trained on; the pixel shuffle takes squares only.
        grid = (isqrt(per_tile), isqrt(per_tile))
        config: Any = call.inner.config
        return MediaLayout(
            tokens=[per_tile // config.scale_factor**2] * tiles, entries=[1] * tiles, grids=[grid] * tiles
        )
