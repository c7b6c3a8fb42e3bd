"""Gemma 3 and PaliGemma: SigLIP vision towers, one entry per image (or crop of pan-and-scan)."""

from __future__ import annotations

from math import isqrt
from typing import Any

from torch import nn

from emma_adapter import MediaLayout, ModelFamily, ProjectorCall


class GemmaFamily(ModelFamily):
    """Features ``[images, N, D]``; Gemma 3 pools them in the projector, after they are aligned."""

    model_types = ("gemma3", "paligemma")

    def visual_dim(self, inner: nn.Module) -> int:
        config: Any = inner.config
        return int(config.vision_config.hidden_size)

    def visual_size(self, inner: nn.Module) -> tuple[int | None, tuple[int, int] | None]:
        config: Any = inner.config
        side = config.vision_config.image_size // config.vision_config.patch_size
        return side * side, (side, side)

    def projector_merge(self, inner: nn.Module) -> int:
        number, _ = self.visual_size(inner)
        assert number is not None
        return isqrt(number // getattr(inner.config, "mm_tokens_per_image", number))

    def layout(self, call: ProjectorCall) -> MediaLayout:
        images, per_image = call.visual_tokens.shape[:2]
        tokens = getattr(call.inner.config, "mm_tokens_per_image", per_image)
        return MediaLayout(tokens=[tokens] * images, entries=[1] * images)
