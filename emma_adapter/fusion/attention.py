"""Residual cross-attention: any number of visual tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from .cross_attention import CrossAttention, keep_uninstructed
from .layers import add_update
from .registry import Fusion, register_fusion

if TYPE_CHECKING:
    from ..config import EmmaConfig


@register_fusion("attention")
class AttentionFusion(Fusion):
    """``V + CrossAttention(V, T)``. An empty instruction leaves V unchanged."""

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
        update = self.cross_attention(visual_tokens, instruction_tokens, instruction_mask, grid)
        return keep_uninstructed(add_update(visual_tokens, update), visual_tokens, instruction_mask)
