"""Ovis2: images cut into tiles, whose visual tokens become mixtures of the rows of a visual embedding table."""

from __future__ import annotations

from math import ceil
from typing import Any

from torch import nn

from emma_adapter import MediaLayout, ModelFamily, ProjectorCall


class Ovis2Family(ModelFamily):
    """Features ``[tiles, N, D]``: squares of patches, side by side in a token, before they are read as a vocabulary.

    Each tile has placeholders of its own. Behind the projector they are no tokens yet, but scores of the table's rows.
    """

    model_types = ("ovis2",)
    projector_path = "vision_tower.head_linear"
    tiles = True
    cannot_align_projected = "it puts out scores of a visual vocabulary, which are no tokens of the language model yet"

    def visual_dim(self, inner: nn.Module) -> int:
        config: Any = inner.config
        return int(config.vision_config.hidden_size * config.vision_config.hidden_stride**2)

    def visual_size(self, inner: nn.Module) -> tuple[int | None, tuple[int, int] | None]:
        config: Any = inner.config
        vision = config.vision_config
        # The last square of a row is padded.
        side = ceil(vision.image_size // vision.patch_size / vision.hidden_stride)
        return side * side, (side, side)

    def layout(self, call: ProjectorCall) -> MediaLayout:
        tiles, per_tile = call.visual_tokens.shape[:2]
        return MediaLayout(tokens=[per_tile] * tiles, entries=[1] * tiles)
