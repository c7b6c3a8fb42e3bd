"""Linear and LayerNorm that compute in the dtype of their input.

The adapter keeps float32 weights beside a half-precision model, because steps of 1e-3 vanish in bfloat16
weights; the product itself is computed in the dtype of the visual tokens. They don't subclass
``nn.Linear``, so that tools that rewrite every ``nn.Linear`` of a model (LoRA on "all-linear", quantisation)
leave the adapter alone.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def add_update(visual_tokens: Tensor, update: Tensor) -> Tensor:
    """Return ``visual_tokens + update``, bit for bit ``visual_tokens`` where the update is zero.

    ``-0.0 + 0.0`` is ``+0.0``, but ``x - 0.0`` is ``x`` for every x; the negation is exact.
    """
    return visual_tokens - (0 - update)


class CastingLinear(nn.Module):
    """``x W^T + b``; weight ``[out, in]``, bias ``[out]`` or none, initialised as ``nn.Linear`` is."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        bound = 1 / math.sqrt(in_features)
        nn.init.uniform_(self.weight, -bound, bound)
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features))
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)

    def extra_repr(self) -> str:
        return f"in_features={self.weight.shape[1]}, out_features={self.weight.shape[0]}"


class CastingLayerNorm(nn.Module):
    """LayerNorm over the last dimension with a learned scale and shift."""

    def __init__(self, features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)
