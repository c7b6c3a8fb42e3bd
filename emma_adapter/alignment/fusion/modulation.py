"""A channel mask drawn from the instruction."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import register_fusion
from .cross_attention import CrossAttentionFusion


@register_fusion("modulation")
class ModulationFusion(CrossAttentionFusion):
    """``V * 2 sigmoid(CrossAttention(V, T))``: each channel of each visual token is scaled by 0 to 2.

    In the manner of MoDA (arXiv 2506.01850), whose mask is ``sigmoid``; the factor 2 makes an untrained
    adapter the identity, since ``2 sigmoid(0)`` is exactly 1. An empty instruction leaves V unchanged.
    """

    epilogue = "modulate"

    def apply_update(self, visual_tokens: Tensor, update: Tensor) -> Tensor:
        return visual_tokens * (2 * torch.sigmoid(update))
