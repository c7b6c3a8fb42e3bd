"""Cross-attention from visual tokens to instruction tokens, shared by ``attention`` and ``modulation``."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ...errors import ShapeError
from .base import Fusion
from .dispatch import weights_elsewhere
from .layers import CastingLayerNorm, CastingLinear
from .nonfinite import untouched_tokens
from .packed_images import Grid, Packing
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
        grid: Grid | None,
    ) -> Tensor:
        """Attend to the instruction: ``[B, N, D], [B, T, Dt], bool [B, T] or None -> [B, N, D]``.

        Rows without a valid instruction token hold arbitrary finite values.
        """
        keys, values = self._keys_and_values(instruction_tokens, instruction_mask)
        mask = None
        if instruction_mask is not None:
            # A softmax over no key is NaN: an empty instruction attends to its blanked padding.
            mask = instruction_mask | ~instruction_mask.any(dim=1, keepdim=True)
            mask = mask[:, None, None, :]
        query = self.query(self.visual_norm(visual_tokens))
        positions = self.positions(visual_tokens.shape[1], grid)
        if positions is not None:
            query = query + positions.to(query.dtype)
        attended = F.scaled_dot_product_attention(
            self._split_heads(query), self._split_heads(keys), self._split_heads(values), attn_mask=mask
        )
        return self.output(rearrange(attended, "b h n d -> b n (h d)"))

    def fused(
        self,
        visual_tokens: Tensor,
        instruction_tokens: Tensor,
        instruction_mask: Tensor | None,
        epilogue: Literal["add", "modulate"],
        **layout: Tensor | None,
    ) -> Tensor:
        """Compute update and residual together, by the Triton kernels.

        ``layout`` holds further arguments of :func:`~emma_adapter.kernels.cross_attention.cross_attention`.
        """
        from ...kernels.cross_attention import cross_attention, keys_and_values

        assert self.query.bias is not None and self.output.bias is not None and self.value.bias is not None
        keys, values, cast_weights = keys_and_values(
            instruction_tokens,
            instruction_mask,
            norm_weight=self.instruction_norm.weight,
            norm_bias=self.instruction_norm.bias,
            key_weight=self.key.weight,
            value_weight=self.value.weight,
            value_bias=self.value.bias,
            query_weight=self.query.weight,
            output_weight=self.output.weight,
            eps=self.instruction_norm.eps,
        )
        return cross_attention(
            visual_tokens,
            keys,
            values,
            instruction_mask,
            num_heads=self.num_heads,
            norm_weight=self.visual_norm.weight,
            norm_bias=self.visual_norm.bias,
            query_weight=self.query.weight,
            query_bias=self.query.bias,
            output_weight=self.output.weight,
            output_bias=self.output.bias,
            eps=self.visual_norm.eps,
            cast_weights=cast_weights,
            epilogue=epilogue,
            **layout,
        )

    def kernel_problem(self, visual_tokens: Tensor) -> str | None:
        """Return why the Triton kernels can't compute :meth:`fused`, or None."""
        from ...kernels.cross_attention import unsupported_reason

        weight = self.query.weight
        return weights_elsewhere(visual_tokens, weight) or unsupported_reason(
            visual_tokens, weight.shape[0], self.num_heads
        )

    def positions(self, num_visual_tokens: int, grid: Grid | None) -> Tensor | None:
        """Return the query term of each visual token ``[N, inner_dim]``, or None if the adapter has learned none.

        The terms are resampled if the image has another grid.
        """
        if self.position is None:
            return None
        native = self.position.shape[0]
        if grid is None or grid == self.native_grid:
            if num_visual_tokens != native:
                raise ShapeError(
                    f"the adapter has learned positions for {native} visual tokens an image and got "
                    f"{num_visual_tokens}. The image or the features selected from the vision tower are not those "
                    "the adapter was made for; with EmmaConfig.visual_grid, grid=(height, width) resamples positions"
                )
            return self.position
        if self.native_grid is None:
            raise ShapeError(f"positions can't be resampled to grid={grid} without EmmaConfig.visual_grid")
        return resample(self.position, self.native_grid, grid)

    def _keys_and_values(self, instruction_tokens: Tensor, instruction_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return keys and values, ``[B, T, inner_dim]`` each."""
        if instruction_mask is not None:
            instruction_tokens = instruction_tokens.masked_fill(~instruction_mask[..., None], 0)
        instruction = self.instruction_norm(instruction_tokens)
        return self.key(instruction), self.value(instruction)

    def _split_heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "b n (h d) -> b h n d", h=self.num_heads)


class CrossAttentionFusion(Fusion):
    """A fusion that applies the result of :class:`CrossAttention` to the visual tokens one by one."""

    has_kernel = True
    #: The kernels' name for what :meth:`apply_update` does.
    epilogue: ClassVar[Literal["add", "modulate"]]

    def __init__(self, config: EmmaConfig) -> None:
        super().__init__(config)
        self.cross_attention = CrossAttention(config)

    @abstractmethod
    def apply_update(self, visual_tokens: Tensor, update: Tensor) -> Tensor:
        """Update ``[B, N, D], [B, N, D] -> [B, N, D]``; where the update is zero, keep the tokens bit for bit."""

    def forward(
        self,
        visual_tokens: Tensor,
        instruction_tokens: Tensor,
        instruction_mask: Tensor | None,
        grid: Grid | None = None,
    ) -> Tensor:
        attention = self.cross_attention
        if self._takes_triton(visual_tokens):
            positions = attention.positions(visual_tokens.shape[1], grid)
            return attention.fused(
                visual_tokens, instruction_tokens, instruction_mask, self.epilogue, position=positions
            )
        untouched = untouched_tokens(visual_tokens, instruction_mask)
        if untouched is None:
            return self.apply_update(
                visual_tokens, attention(visual_tokens, instruction_tokens, instruction_mask, grid)
            )
        # Blanked before anything is computed from them: a NaN there would reach all gradients through `where`.
        blanked = visual_tokens.masked_fill(untouched, 0)
        aligned = self.apply_update(blanked, attention(blanked, instruction_tokens, instruction_mask, grid))
        return torch.where(untouched, visual_tokens, aligned)

    def forward_packed(
        self, visual_tokens: Tensor, instruction_tokens: Tensor, instruction_mask: Tensor | None, packing: Packing
    ) -> Tensor:
        if not packing.grids or not self._takes_triton(visual_tokens):
            return super().forward_packed(visual_tokens, instruction_tokens, instruction_mask, packing)
        return self.cross_attention.fused(
            visual_tokens, instruction_tokens, instruction_mask, self.epilogue, **self._kernel_layout(packing)
        )

    def _takes_triton(self, visual_tokens: Tensor) -> bool:
        return self.dispatch.takes_triton(
            visual_tokens, lambda: self.cross_attention.kernel_problem(visual_tokens), trains=self.trains
        )

    def _kernel_layout(self, packing: Packing) -> dict[str, Tensor | None]:
        """Return where each entry begins, a table of all grids' query terms, and where each entry's begin in it."""
        device = self.cross_attention.query.weight.device
        layout: dict[str, Tensor | None] = {
            "cu_seqlens": packing.starts(device),
            "instruction_rows": packing.rows_on(device),
        }
        if self.cross_attention.position is None:
            return layout
        tables = []
        for grid in dict.fromkeys(packing.grids):
            table = self.cross_attention.positions(grid[0] * grid[1], grid)
            assert table is not None
            order = packing.order(grid, device)
            tables.append(table if order is None else table[order])
        layout["position"] = torch.cat(tables)
        layout["position_start"] = packing.table_starts(device)
        return layout
