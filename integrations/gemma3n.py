"""Gemma 3n: images of one size, which a convolutional tower turns into one grid of tokens each."""

from __future__ import annotations

from math import isqrt
from typing import Any

from torch import nn

from emma_adapter import MediaLayout, ModelFamily, ProjectorCall


class Gemma3nFamily(ModelFamily):
    """Features ``[images, N, D]``, row by row; the projector also embeds the ids of a few special tokens."""

    model_types = ("gemma3n",)
    projector_path = "embed_vision"

    def visual_dim(self, inner: nn.Module) -> int:
        config: Any = inner.config
        return int(config.vision_config.hidden_size)

    def visual_size(self, inner: nn.Module) -> tuple[int | None, tuple[int, int] | None]:
        config: Any = inner.config
        number = int(config.vision_soft_tokens_per_image)
        return number, (isqrt(number), isqrt(number))

    def layout(self, call: ProjectorCall) -> MediaLayout:
        images, per_image = call.visual_tokens.shape[:2]
        return MediaLayout(tokens=[per_image] * images, entries=[1] * images)
