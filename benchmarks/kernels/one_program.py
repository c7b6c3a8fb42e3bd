"""A prototype: the forward of ``attention`` and ``modulation`` for images of one size as one kernel.

A program keeps its rows through query projection, attention and output projection. q and o pass between them through
global memory that is still in the caches, and that training needs there anyway. V is read once from memory and a second
time from the L2 cache, where the three kernels of the package read it twice and o once more. LayerNorm needs no pass of
its own: ``LN(x) W_q^T = rstd (x W'^T - mean colsum(W')) + c`` with ``W' = W_q diag(g)`` and ``c = W_q b + b_q``; its
variance is ``E x^2 - (E x)^2``, which is why this is a prototype: it loses what a mean far beyond the deviation leaves.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"
# ruff: noqa: E741, N803, N806, PLR0915 (sizes are upper-case in Triton code; a kernel is one function)

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from emma_adapter.kernels.cross_attention import keys_and_values
from emma_adapter.kernels.cross_attention.tiles import LOG2_E
from emma_adapter.kernels.launch import Configuration, cdiv, dot, rounded

#: BLOCK_M, warps and stages that compile for sm_90 without spills.
SCHEDULES = ((64, 8, 3), (64, 8, 2))


@triton.jit(do_not_specialize=["N", "T", "blocks"], do_not_specialize_on_alignment=["key_mask_ptr"])
def one_program(
    x_ptr,  # [S, N, D]
    weight_ptr,  # W' [I, D]
    column_sum_ptr,  # float32 [I]
    bias_ptr,  # float32 [I]: c
    position_ptr,  # float32 [N, I]
    key_ptr,  # [S, T, I]
    value_ptr,  # [S, T, I]
    key_mask_ptr,  # uint8 [S, T]
    num_keys_ptr,  # int32 [S]: up to the last valid one
    output_weight_ptr,  # [D, I]
    output_bias_ptr,  # float32 [D]
    query_ptr,  # out [S N, I]
    attended_ptr,  # out [S N, I]
    y_ptr,  # out [S, N, D]
    N,
    T,
    D,
    blocks,
    eps,
    scale,
    I: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    MODULATE: tl.constexpr,
):
    """One program for BLOCK_M tokens of a segment."""
    HEAD: tl.constexpr = I // HEADS
    segment = tl.program_id(0) // blocks
    rows = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < N
    base = segment.to(tl.int64) * N
    x_rows = x_ptr + base * D + rows[:, None] * D
    inner = tl.arange(0, I)
    query = tl.zeros([BLOCK_M, I], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    squares = tl.zeros([BLOCK_M], tl.float32)
    for first in range(0, D, BLOCK_D):
        channels = first + tl.arange(0, BLOCK_D)
        x = tl.load(x_rows + channels[None, :], mask=inside[:, None] & (channels < D)[None, :], other=0.0)
        weight = tl.load(weight_ptr + inner[:, None] * D + channels[None, :], mask=(channels < D)[None, :], other=0.0)
        query = dot(x, tl.trans(weight), query)
        wide = x.to(tl.float32)
        total += tl.sum(wide, 1)
        squares += tl.sum(wide * wide, 1)
    mean = total / D
    rstd = tl.rsqrt(tl.maximum(squares / D - mean * mean, 0.0) + eps)
    finite = rstd == rstd  # noqa: PLR0124 (NaN)
    query = (query - mean[:, None] * tl.load(column_sum_ptr + inner)[None, :]) * rstd[:, None]
    query += tl.load(bias_ptr + inner)[None, :]
    query += tl.load(position_ptr + rows[:, None] * I + inner[None, :], mask=inside[:, None], other=0.0)
    query = tl.where(finite[:, None], query, 0.0)
    tokens = (base + rows)[:, None] * I
    tl.store(query_ptr + tokens + inner[None, :], rounded(query, x_ptr.dtype.element_ty), mask=inside[:, None])
    tl.debug_barrier()

    keys = tl.load(num_keys_ptr + segment)
    first_key = segment.to(tl.int64) * T
    for head in tl.range(0, HEADS, num_stages=1):
        columns = head * HEAD + tl.arange(0, HEAD)
        q = tl.load(query_ptr + tokens + columns[None, :], mask=inside[:, None], other=0.0)
        highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
        weights_total = tl.zeros([BLOCK_M], tl.float32)
        attended = tl.zeros([BLOCK_M, HEAD], tl.float32)
        for first in tl.range(0, keys, BLOCK_T, num_stages=1):
            t = first + tl.arange(0, BLOCK_T)
            valid = tl.load(key_mask_ptr + first_key + t, mask=t < T, other=0) != 0
            places = (first_key + t)[:, None] * I + columns[None, :]
            key = tl.load(key_ptr + places, mask=valid[:, None], other=0.0)
            value = tl.load(value_ptr + places, mask=valid[:, None], other=0.0)
            scores = dot(q, tl.trans(key), tl.zeros([BLOCK_M, BLOCK_T], tl.float32)) * (scale * LOG2_E)
            scores = tl.where(valid[None, :], scores, float("-inf"))
            higher = tl.maximum(highest, tl.max(scores, 1))
            anchor = tl.where(higher == float("-inf"), 0.0, higher)
            weights = tl.exp2(scores - anchor[:, None])
            decay = tl.exp2(highest - anchor)
            weights_total = weights_total * decay + tl.sum(weights, 1)
            attended = dot(rounded(weights, q.dtype), value, attended * decay[:, None])
            highest = higher
        attended = attended / tl.where(weights_total == 0.0, 1.0, weights_total)[:, None]
        tl.store(
            attended_ptr + tokens + columns[None, :], rounded(attended, x_ptr.dtype.element_ty), mask=inside[:, None]
        )
    tl.debug_barrier()

    o = tl.load(attended_ptr + tokens + inner[None, :], mask=inside[:, None], other=0.0)
    updated = inside & finite & (keys > 0)
    for first in range(0, D, BLOCK_D):
        channels = first + tl.arange(0, BLOCK_D)
        here = inside[:, None] & (channels < D)[None, :]
        weight = tl.load(
            output_weight_ptr + channels[:, None] * I + inner[None, :], mask=(channels < D)[:, None], other=0.0
        )
        x = tl.load(x_rows + channels[None, :], mask=here, other=0.0)
        z = dot(o, tl.trans(weight), tl.zeros([BLOCK_M, BLOCK_D], tl.float32))
        z += tl.load(output_bias_ptr + channels, mask=channels < D, other=0.0)[None, :]
        y = x.to(tl.float32)
        y = y * (2.0 * tl.sigmoid(z)) if MODULATE else y + z
        y = tl.where(updated[:, None] & (z != 0.0), rounded(y, x_ptr.dtype.element_ty), x)
        tl.store(y_ptr + base * D + rows[:, None] * D + channels[None, :], y, mask=here)


def configuration(
    dtype: torch.dtype, schedule: tuple[int, int, int], *, inner: int, heads: int, modulate: bool
) -> Configuration:
    block, warps, stages = schedule
    float32 = ("column_sum_ptr", "bias_ptr", "position_ptr", "output_bias_ptr")
    constants = {"I": inner, "HEADS": heads, "BLOCK_M": block, "BLOCK_D": 64, "BLOCK_T": 64, "MODULATE": modulate}
    return Configuration(
        one_program,
        dtype,
        types=(
            *((name, torch.float32) for name in float32),
            ("key_mask_ptr", torch.uint8),
            ("num_keys_ptr", torch.int32),
        ),
        constants=tuple(constants.items()),
        num_warps=warps,
        num_stages=stages,
    )


class OneProgram:
    """The forward of a fusion with positions, for inputs whose weights are prepared once; :meth:`run` is the kernel.

    Args:
        fusion: ``attention`` or ``modulation``, its inner width a power of two.
        visual: ``[S, N, D]``, N being that of the positions.
        instruction: ``[S, T, Dt]``.
        mask: bool ``[S, T]``.
    """

    @torch.no_grad()
    def __init__(self, fusion: Any, visual: Tensor, instruction: Tensor, mask: Tensor) -> None:
        cross = fusion.cross_attention
        dtype, norm = visual.dtype, cross.visual_norm
        key, value, _ = keys_and_values(
            instruction,
            mask,
            norm_weight=cross.instruction_norm.weight,
            norm_bias=cross.instruction_norm.bias,
            key_weight=cross.key.weight,
            value_weight=cross.value.weight,
            value_bias=cross.value.bias,
            query_weight=cross.query.weight,
            output_weight=cross.output.weight,
        )
        weight = (cross.query.weight * norm.weight).to(dtype)
        length, inner = mask.shape[1], weight.shape[0]
        self.heads, self.modulate = cross.num_heads, fusion.epilogue == "modulate"
        self.arguments = {
            "x_ptr": visual,
            "weight_ptr": weight,
            "column_sum_ptr": weight.float().sum(1),
            "bias_ptr": cross.query.weight @ norm.bias + cross.query.bias,
            "position_ptr": cross.position.detach(),
            "key_ptr": key,
            "value_ptr": value,
            "key_mask_ptr": mask.contiguous().view(torch.uint8),
            "num_keys_ptr": (mask * torch.arange(1, length + 1, device=mask.device)).amax(1).int(),
            "output_weight_ptr": cross.output.weight.to(dtype),
            "output_bias_ptr": cross.output.bias.detach(),
            "query_ptr": visual.new_empty(visual.shape[0] * visual.shape[1], inner),
            "attended_ptr": visual.new_empty(visual.shape[0] * visual.shape[1], inner),
            "N": visual.shape[1],
            "T": length,
            "D": visual.shape[2],
            "eps": norm.eps,
            "scale": 1 / math.sqrt(inner // self.heads),
        }
        self.inner = inner

    def run(self, schedule: tuple[int, int, int]) -> Tensor:
        """``[S, N, D]``."""
        x = self.arguments["x_ptr"]
        own = configuration(x.dtype, schedule, inner=self.inner, heads=self.heads, modulate=self.modulate)
        blocks, y = cdiv(x.shape[1], schedule[0]), torch.empty_like(x)
        own.launch((len(x) * blocks,), x.device, **self.arguments, y_ptr=y, blocks=blocks)
        return y
