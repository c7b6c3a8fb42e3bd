"""Residual cross-attention: any number of visual tokens."""

from __future__ import annotations

from torch import Tensor

from .base import register_fusion
from .cross_attention import CrossAttentionFusion
from .layers import add_update


@register_fusion("attention")
class AttentionFusion(CrossAttentionFusion):
    """``V + CrossAttention(V, T)``. An empty instruction leaves V unchanged."""

    epilogue = "add"

    def apply_update(self, visual_tokens: Tensor, update: Tensor) -> Tensor:
        return add_update(visual_tokens, update)
