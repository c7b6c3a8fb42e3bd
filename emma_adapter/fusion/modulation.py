"""A channel mask drawn from the instruction."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .cross_attention import CrossAttention, keep_uninstructed
from .registry import Fusion, register_fusion

if TYPE_CHECKING:
    from ..config import EmmaConfig


@register_fusion("modulation")
class ModulationFusion(Fusion):
    """``V * 2 sigmoid(CrossAttention(V, T))``: each channel of each visual token is scaled by 0 to 2.

    In the manner of MoDA (arXiv 2506.01850), whose mask is ``sigmoid``; the factor 2 makes an untrained
    adapter the identity, since ``2 sigmoid(0)`` is exactly 1. An empty instruction leaves V unchanged.
    """

    def __init__(self, config: EmmaConfig) -> None:
        super().__init__(config)
        self.cross_attention = CrossAttention(config)

    def forward(
        self,
        visual_tokens: Tensor,
        instruction_tokens: Tensor,
        instruction_mask: Tensor | None,
        grid: tuple[int, int] | None = None,
    ) -> Tensor:
        scale = 2 * torch.sigmoid(self.cross_attention(visual_tokens, instruction_tokens, instruction_mask, grid))
        return keep_uninstructed(visual_tokens * scale, visual_tokens, instruction_mask)
