"""Command A Vision and Aya Vision: images cut into tiles, each with placeholders of its own."""

from __future__ import annotations

from math import isqrt
from typing import Any

from torch import nn

from emma_adapter import MediaLayout, ModelFamily, ProjectorCall


class CohereVisionFamily(ModelFamily):
    """Features ``[tiles, N, D]``, row by row; the projector merges squares of them, and returns grids."""

    model_types = ("cohere2_vision", "aya_vision")
    tiles = True

    def visual_dim(self, inner: nn.Module) -> int:
        config: Any = inner.config
        # Only Aya Vision's features may be of a lower layer, or of several.
        layers = getattr(config, "vision_feature_layer", -1)
        return int(config.vision_config.hidden_size) * (1 if isinstance(layers, int) else len(layers))

    def visual_size(self, inner: nn.Module) -> tuple[int | None, tuple[int, int] | None]:
        config: Any = inner.config
        side = config.vision_config.image_size // config.vision_config.patch_size
        return side * side, (side, side)

    def projector_merge(self, inner: nn.Module) -> int:
        config: Any = inner.config
        return int(config.downsample_factor)

    def layout(self, call: ProjectorCall) -> MediaLayout:
        tiles, per_tile = call.visual_tokens.shape[:2]
        merged = per_tile // self.projector_merge(call.inner) ** 2
        # The projector takes squares only.
        grid = (isqrt(per_tile), isqrt(per_tile))
        return MediaLayout(tokens=[merged] * tiles, entries=[1] * tiles, grids=[grid] * tiles)
