"""LLaVA with a pooling projector: all the code that the benchmark's base model has of its own. ``save_pretrained``
puts this file beside the weights, so that transformers loads the folder with ``trust_remote_code=True``."""

from __future__ import annotations

import math

import torch
from einops import rearrange
from transformers import LlavaConfig, LlavaForConditionalGeneration
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

#: Tokens an image is pooled to, and the grid they are the averages of.
POOLED_GRIDS = {1: (1, 1), 2: (2, 1), 4: (2, 2), 16: (4, 4)}


class PooledProjector(LlavaMultiModalProjector):
    """LLaVA's projector followed by average pooling of the visual tokens of an image into ``image_seq_length``."""

    def __init__(self, config: LlavaConfig):
        super().__init__(config)
        self.grid = POOLED_GRIDS[config.image_seq_length]

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        projected = super().forward(image_features)
        height, width = self.grid
        if height * width == 1:
            return projected.mean(dim=1, keepdim=True)
        side = math.isqrt(projected.shape[1])
        return rearrange(
            projected, "n (r h c w) d -> n (r c) (h w) d", r=height, c=width, h=side // height, w=side // width
        ).mean(dim=2)


class PooledLlava(LlavaForConditionalGeneration):
    """LLaVA whose projector pools; everything else is inherited."""

    def __init__(self, config: LlavaConfig):
        super().__init__(config)
        self.model.multi_modal_projector = PooledProjector(config)
        self.post_init()
