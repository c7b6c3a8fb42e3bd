"""LLaVA with a pooling projector: all the code that the benchmark's base model has of its own. ``save_pretrained``
puts this file beside the weights, so that transformers loads the folder with ``trust_remote_code=True``."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from einops import rearrange
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector


class Pooling(NamedTuple):
    """The cells of an image that become one token each, and how: their projected patches are averaged; their patches
    are, and then projected; or the channels of their patches are put beside one another, and then projected."""

    grid: tuple[int, int]
    how: Literal["average", "average, then project", "pixel shuffle"] = "average"

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)


#: ``config.pooling``: tokens an image. Gemma 3 averages before its projection; InternVL and Idefics3 shuffle.
POOLINGS = {
    "1": Pooling((1, 1)),
    "2": Pooling((2, 1)),
    "4": Pooling((2, 2)),
    "9": Pooling((3, 3)),
    "16": Pooling((4, 4)),
    "4, pixel shuffle": Pooling((2, 2), "pixel shuffle"),
    "1, averaged before projecting": Pooling((1, 1), "average, then project"),
}


class PooledProjector(LlavaMultiModalProjector):
    """LLaVA's projector, with the patches of an image pooled to ``config.image_seq_length`` tokens: ``[B, N, D]`` to
    ``[B, tokens, text width]``."""

    def __init__(self, config: LlavaConfig):
        super().__init__(config)
        self.pooling = POOLINGS[config.pooling]
        if self.pooling.how == "pixel shuffle":
            vision: Any = config.vision_config
            patches = (vision.image_size // vision.patch_size) ** 2
            first = self.linear_1
            wider = first.in_features * patches // self.pooling.tokens
            self.linear_1 = nn.Linear(wider, first.out_features, bias=first.bias is not None)

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        if self.pooling.how == "average":
            return self._cells(super().forward(image_features)).mean(dim=2)
        cells = self._cells(image_features)
        return super().forward(cells.flatten(2) if self.pooling.how == "pixel shuffle" else cells.mean(dim=2))

    def _cells(self, patches: torch.Tensor) -> torch.Tensor:
        """``[B, N, D] -> [B, cells, patches of a cell, D]``."""
        (height, width), side = self.pooling.grid, math.isqrt(patches.shape[1])
        return rearrange(
            patches, "n (r h c w) d -> n (r c) (h w) d", r=height, c=width, h=side // height, w=side // width
        )


class PooledLlava(LlavaForConditionalGeneration):
    """LLaVA whose projector pools; everything else is inherited."""

    def __init__(self, config: LlavaConfig):
        super().__init__(config)
        self.model.multi_modal_projector = PooledProjector(config)
        self.post_init()
