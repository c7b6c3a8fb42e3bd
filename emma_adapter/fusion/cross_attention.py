"""Cross-attention from visual tokens to instruction tokens, shared by ``attention`` and ``modulation``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..errors import ShapeError
from .layers import CastingLayerNorm, CastingLinear
from .resampling import resample

if TYPE_CHECKING:
    from ..config import EmmaConfig

# Standard deviation of query and key entries at initialisation. Scores then have a standard deviation of about
# 2.25, so that heads look at different tokens from the start; the usual small initialisation attends almost
# uniformly and was seen not to learn for hundreds of steps.
_SHARPNESS = 1.5


class CrossAttention(nn.Module):
    """``softmax((LN(V) W_q + pos) K^T / sqrt(d) + mask) V_T W_o``, with keys and values from ``LN(T)``.

    ``pos [N, inner_dim]`` is a learned query term per position: without it, two identical patches at different
    places would ask the instruction the same question. ``W_o`` starts at zero.
    """

    def __init__(self, config: EmmaConfig) -> None:
        super().__init__()
        assert config.visual_dim and config.instruction_dim
        inner = config.inner_dim
        self.num_heads = config.num_heads
        self.native_grid = config.visual_grid
        self.visual_norm = CastingLayerNorm(config.visual_dim)
        self.instruction_norm = CastingLayerNorm(config.instruction_dim)
        self.query = CastingLinear(config.visual_dim, inner)
        # A bias of the keys would shift all scores of a query alike, which softmax ignores.
        self.key = CastingLinear(config.instruction_dim, inner, bias=False)
        self.value = CastingLinear(config.instruction_dim, inner)
        self.output = CastingLinear(inner, config.visual_dim)
        self.position: nn.Parameter | None = None
        query_std = _SHARPNESS
        if config.num_visual_tokens is not None:
            # Content and position share the variance of the query.
            query_std = _SHARPNESS / 2**0.5
            self.position = nn.Parameter(torch.randn(config.num_visual_tokens, inner) * query_std)
        nn.init.normal_(self.query.weight, std=query_std / config.visual_dim**0.5)
        nn.init.normal_(self.key.weight, std=_SHARPNESS / config.instruction_dim**0.5)
        nn.init.zeros_(self.output.weight)
        assert self.output.bias is not None
        nn.init.zeros_(self.output.bias)

    def forward(
        self,
        visual_tokens: Tensor,
        instruction_tokens: Tensor,
        instruction_mask: Tensor | None,
        grid: tuple[int, int] | None,
    ) -> Tensor:
        """``[B, N, D], [B, T, Dt], bool [B, T] or None -> [B, N, D]``. Rows without a valid instruction token
        hold arbitrary finite values; see :func:`keep_uninstructed`."""
        mask = None
        if instruction_mask is not None:
            instruction_tokens = instruction_tokens.masked_fill(~instruction_mask[..., None], 0)
            # A softmax over no key is NaN: an empty instruction attends to its blanked padding.
            mask = instruction_mask | ~instruction_mask.any(dim=1, keepdim=True)
            mask = mask[:, None, None, :]
        query = self.query(self.visual_norm(visual_tokens))
        if self.position is not None:
            query = query + self._positions(visual_tokens.shape[1], grid).to(query.dtype)
        instruction = self.instruction_norm(instruction_tokens)
        attended = F.scaled_dot_product_attention(
            self._split_heads(query),
            self._split_heads(self.key(instruction)),
            self._split_heads(self.value(instruction)),
            attn_mask=mask,
        )
        return self.output(rearrange(attended, "b h n d -> b n (h d)"))

    def _split_heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "b n (h d) -> b h n d", h=self.num_heads)

    def _positions(self, num_visual_tokens: int, grid: tuple[int, int] | None) -> Tensor:
        """The query term of each visual token ``[N, inner_dim]``, resampled if the image has another grid."""
        assert self.position is not None
        native = self.position.shape[0]
        if grid is None or grid == self.native_grid:
            if num_visual_tokens != native:
                raise ShapeError(
                    f"the adapter has learned positions for {native} visual tokens an image and got "
                    f"{num_visual_tokens}. The image or the features selected from the vision tower are other than "
                    "the adapter was made for; with EmmaConfig.visual_grid, grid=(height, width) resamples positions"
                )
            return self.position
        if self.native_grid is None:
            raise ShapeError(f"positions can't be resampled to grid={grid} without EmmaConfig.visual_grid")
        return resample(self.position, self.native_grid, grid)


def keep_uninstructed(aligned: Tensor, visual_tokens: Tensor, instruction_mask: Tensor | None) -> Tensor:
    """``aligned``, but the untouched visual tokens in rows whose instruction has no valid token."""
    if instruction_mask is None:
        return aligned
    return torch.where(instruction_mask.any(dim=1)[:, None, None], aligned, visual_tokens)
