"""Cross-attention, forward: three kernels, in the order in which they run."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"
# ruff: noqa: E741, N803 (sizes are upper-case in Triton code)

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Configuration, aligned, cdiv, dot, rounded
from .layout import Layout, in_dtype, mask_bytes
from .tiles import (
    BLOCKS,
    LOG2_E,
    MANY_PROGRAMS,
    attended_tile,
    configuration,
    head_block,
    instruction_row,
    is_finite_token,
    number_of_keys,
    output_tile,
    row_statistics,
    segment_slice,
    updated_rows,
    variants,
    weight_tile,
)


@triton.jit(
    do_not_specialize=["M", "N", "P", "num_segments", "search_steps"],
    do_not_specialize_on_alignment=["position_start_ptr", "cu_seqlens_ptr"],
)
def query_forward(
    x_ptr,  # [M, D]
    norm_weight_ptr,  # float32 [D]
    norm_bias_ptr,  # float32 [D]
    weight_ptr,  # [I, D]
    bias_ptr,  # float32 [I]
    position_ptr,  # float32 [P, I]; not read if P is 0
    position_start_ptr,  # int32 [S]
    cu_seqlens_ptr,  # int32 [S + 1]
    query_ptr,  # out [M, I]
    center_ptr,  # out float32 [M, 2]: the mean in two parts, see row_statistics
    rstd_ptr,  # out float32 [M]
    M,
    N,  # tokens of every segment; 0 if cu_seqlens says how many
    D,
    I,
    P,
    num_segments,
    search_steps,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Compute ``q = LN(x) W_q^T + b_q + position``; one program for BLOCK_M tokens and BLOCK_I columns."""
    inner_blocks = tl.cdiv(I, BLOCK_I)
    rows = tl.program_id(0) // inner_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    inner = tl.program_id(0) % inner_blocks * BLOCK_I + tl.arange(0, BLOCK_I)
    row_inside = rows < M
    x_rows = x_ptr + rows.to(tl.int64) * D

    reference, center, rstd = row_statistics(x_rows, row_inside, D, eps, BLOCK_M, BLOCK_D)
    query = tl.zeros([BLOCK_M, BLOCK_I], tl.float32)
    for first in range(0, D, BLOCK_D):
        channels = first + tl.arange(0, BLOCK_D)
        channel_inside = channels < D
        x = tl.load(
            x_rows[:, None] + channels[None, :], mask=row_inside[:, None] & channel_inside[None, :], other=0.0
        ).to(tl.float32)
        norm_weight = tl.load(norm_weight_ptr + channels, mask=channel_inside, other=0.0)
        norm_bias = tl.load(norm_bias_ptr + channels, mask=channel_inside, other=0.0)
        normed = (x - reference[:, None] - center[:, None]) * rstd[:, None]
        normed = normed * norm_weight[None, :] + norm_bias[None, :]
        weight = tl.load(
            weight_ptr + inner[:, None] * D + channels[None, :],
            mask=(inner < I)[:, None] & channel_inside[None, :],
            other=0.0,
        )
        query = dot(rounded(normed, x_ptr.dtype.element_ty), tl.trans(weight), query)
    query += tl.load(bias_ptr + inner, mask=inner < I, other=0.0)[None, :]

    if P > 0:
        if N > 0:
            place = rows % N
        else:
            # The segment of each row: the last one that starts at or before it.
            low = rows * 0
            high = low + num_segments
            for _ in range(search_steps):
                middle = (low + high) // 2
                reached = tl.load(cu_seqlens_ptr + middle) <= rows
                low = tl.where(reached, middle, low)
                high = tl.where(reached, high, middle)
            place = tl.load(position_start_ptr + low) + rows - tl.load(cu_seqlens_ptr + low)
        query += tl.load(
            position_ptr + place.to(tl.int64)[:, None] * I + inner[None, :],
            mask=((place >= 0) & (place < P))[:, None] & (inner < I)[None, :],
            other=0.0,
        )
    query = tl.where(is_finite_token(rstd)[:, None], query, 0.0)
    tl.store(
        query_ptr + rows.to(tl.int64)[:, None] * I + inner[None, :],
        rounded(query, query_ptr.dtype.element_ty),
        mask=row_inside[:, None] & (inner < I)[None, :],
    )
    if tl.program_id(0) % inner_blocks == 0:
        tl.store(center_ptr + rows.to(tl.int64) * 2, reference, mask=row_inside)
        tl.store(center_ptr + rows.to(tl.int64) * 2 + 1, center, mask=row_inside)
        tl.store(rstd_ptr + rows, rstd, mask=row_inside)


@triton.jit(
    do_not_specialize=["N", "T", "num_heads", "num_segments", "search_steps", "shared"],
    do_not_specialize_on_alignment=["key_mask_ptr", "instruction_ptr", "cu_seqlens_ptr"],
)
def attention_forward(
    query_ptr,  # [M, I]
    key_ptr,  # [R, T, I]
    value_ptr,  # [R, T, I]
    key_mask_ptr,  # uint8 [R, T]
    instruction_ptr,  # int32 [S]
    cu_seqlens_ptr,  # int32 [S + 1]
    attended_ptr,  # out [M, I]
    lse_ptr,  # out float32 [M, H]: log2 of the sum of exponentials, -inf if there is no key
    N,
    T,
    I,
    head_dim,
    num_heads,
    num_segments,
    search_steps,
    shared,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Compute ``softmax(q K^T scale + mask) V``; one program for a head and at most BLOCK_M tokens of one segment."""
    segment, start, stop = segment_slice(tl.program_id(0), cu_seqlens_ptr, N, num_segments, search_steps, BLOCK_M)
    if start >= stop:
        return
    head = tl.program_id(1)
    rows = start + tl.arange(0, BLOCK_M)
    channels = tl.arange(0, BLOCK_H)
    inside = (rows < stop)[:, None] & (channels < head_dim)[None, :]
    places = rows.to(tl.int64)[:, None] * I + head * head_dim + channels[None, :]
    query = tl.load(query_ptr + places, mask=inside, other=0.0)
    first_key = instruction_row(segment, instruction_ptr, shared).to(tl.int64) * T

    # Online softmax (Milakov and Gimelshein 2018).
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    attended = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    for first in range(0, number_of_keys(key_mask_ptr, first_key, T), BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        valid = tl.load(key_mask_ptr + first_key + t, mask=t < T, other=0) != 0
        # Padding is not read: whatever it holds, NaN included, can't reach a product.
        key_places = (first_key + t)[:, None] * I + head * head_dim + channels[None, :]
        key_inside = valid[:, None] & (channels < head_dim)[None, :]
        key = tl.load(key_ptr + key_places, mask=key_inside, other=0.0)
        value = tl.load(value_ptr + key_places, mask=key_inside, other=0.0)
        scores = dot(query, tl.trans(key), tl.zeros([BLOCK_M, BLOCK_T], tl.float32)) * (scale * LOG2_E)
        scores = tl.where(valid[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        anchor = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - anchor[:, None])
        decay = tl.exp2(highest - anchor)
        total = total * decay + tl.sum(weights, 1)
        attended = dot(rounded(weights, query.dtype), value, attended * decay[:, None])
        highest = higher
    empty = total == 0.0
    attended = attended / tl.where(empty, 1.0, total)[:, None]
    tl.store(attended_ptr + places, rounded(attended, attended_ptr.dtype.element_ty), mask=inside)
    lse = tl.where(empty, float("-inf"), highest + tl.log2(tl.where(empty, 1.0, total)))
    tl.store(lse_ptr + rows.to(tl.int64) * num_heads + head, lse, mask=rows < stop)


@triton.jit(do_not_specialize=["M", "num_heads", "channels_a_program"])
def output_forward(
    x_ptr,  # [M, D]
    attended_ptr,  # [M, I]
    lse_ptr,  # float32 [M, H]
    rstd_ptr,  # float32 [M]
    weight_ptr,  # [D, I]
    bias_ptr,  # float32 [D]
    y_ptr,  # out [M, D]
    M,
    D,
    I,
    num_heads,
    channels_a_program,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_I: tl.constexpr,
    MODULATE: tl.constexpr,
    ONE_TILE: tl.constexpr,
):
    """Compute ``y = x + z`` or ``x 2 sigmoid(z)``; one program for BLOCK_M tokens and ``channels_a_program`` channels.

    With ONE_TILE, I is at most BLOCK_I, and o is read once.
    """
    channel_programs = tl.cdiv(D, channels_a_program)
    rows = tl.program_id(0) // channel_programs * BLOCK_M + tl.arange(0, BLOCK_M)
    first_channel = tl.program_id(0) % channel_programs * channels_a_program
    row_inside = rows < M
    updated = updated_rows(lse_ptr, rstd_ptr, rows, row_inside, num_heads)
    if ONE_TILE:
        attended = attended_tile(attended_ptr, rows, row_inside, 0, I, BLOCK_I)
    for first in range(first_channel, tl.minimum(first_channel + channels_a_program, D), BLOCK_D):
        channels = first + tl.arange(0, BLOCK_D)
        inside = row_inside[:, None] & (channels < D)[None, :]
        if ONE_TILE:
            weight = weight_tile(weight_ptr, channels, 0, D, I, BLOCK_I)
            z = dot(attended, tl.trans(weight), tl.zeros([BLOCK_M, BLOCK_D], tl.float32))
            z += tl.load(bias_ptr + channels, mask=channels < D, other=0.0)[None, :]
        else:
            z = output_tile(
                *(attended_ptr, weight_ptr, bias_ptr, rows, row_inside, channels, D, I, BLOCK_M, BLOCK_D, BLOCK_I)
            )
        places = rows.to(tl.int64)[:, None] * D + channels[None, :]
        x = tl.load(x_ptr + places, mask=inside, other=0.0)
        y = x.to(tl.float32)
        y = y * (2.0 * tl.sigmoid(z)) if MODULATE else y + z
        # An untrained adapter is the identity bit for bit, -0.0 included, whatever the arithmetic above makes of it.
        changed = updated[:, None] & (z != 0.0)
        y = tl.where(changed, rounded(y, y_ptr.dtype.element_ty), x)
        tl.store(y_ptr + places, y, mask=inside)


# --- host ------------------------------------------------------------------------------------------------------


def attend(
    x: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor,
    instruction: Tensor | None,
    cu_seqlens: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    position: Tensor | None,
    position_start: Tensor | None,
    output_weight: Tensor,
    output_bias: Tensor,
    cast_weights: Tensor | None,
    *,
    segments: int,
    num_heads: int,
    eps: float,
    modulate: bool,
    outputs: tuple[Tensor, ...],
) -> None:
    """Fill ``outputs``: y ``[M, D]``, query, attended ``[M, I]``, lse ``[M, H]``, center ``[M, 2]``, rstd ``[M]``."""
    y, query, attended, lse, center, rstd = outputs
    dtype, device = x.dtype, x.device
    (tokens, width), inner = x.shape, query_weight.shape[0]
    block = BLOCKS[dtype]
    layout = Layout.of(tokens, segments, cu_seqlens, instruction, unused=rstd)
    row_blocks = cdiv(tokens, block["BLOCK_M"])
    x = aligned(x)
    query_weight, output_weight = in_dtype(query_weight, output_weight, cast_weights, dtype)
    bias = aligned(query_bias, torch.float32)
    configuration(query_forward, dtype).launch(
        (row_blocks * cdiv(inner, block["BLOCK_I"]),),
        device,
        x_ptr=x,
        norm_weight_ptr=aligned(norm_weight, torch.float32),
        norm_bias_ptr=aligned(norm_bias, torch.float32),
        weight_ptr=query_weight,
        bias_ptr=bias,
        position_ptr=bias if position is None else aligned(position, torch.float32),
        position_start_ptr=layout.unused if position_start is None else position_start,
        **layout.rows(),
        query_ptr=query,
        center_ptr=center,
        rstd_ptr=rstd,
        M=tokens,
        D=width,
        I=inner,
        P=0 if position is None else len(position),
        eps=eps,
    )
    head_dim = inner // num_heads
    configuration(attention_forward, dtype, BLOCK_H=head_block(head_dim)).launch(
        (layout.slots(block["BLOCK_M"]), num_heads),
        device,
        query_ptr=query,
        key_ptr=aligned(key, dtype),
        value_ptr=aligned(value, dtype),
        key_mask_ptr=mask_bytes(key_mask),
        **layout.rows(),
        **layout.instructions(),
        attended_ptr=attended,
        lse_ptr=lse,
        T=key.shape[1],
        I=inner,
        head_dim=head_dim,
        num_heads=num_heads,
        scale=1 / math.sqrt(head_dim),
    )
    # One program for each block of tokens reads o once; where those are too few for a GPU, there are more programs.
    channel_blocks = cdiv(width, block["BLOCK_D"])
    channels_a_program = cdiv(channel_blocks, min(channel_blocks, cdiv(MANY_PROGRAMS, row_blocks))) * block["BLOCK_D"]
    one_tile = inner <= block["BLOCK_I"]
    configuration(output_forward, dtype, MODULATE=modulate, ONE_TILE=one_tile).launch(
        (row_blocks * cdiv(width, channels_a_program),),
        device,
        x_ptr=x,
        attended_ptr=attended,
        lse_ptr=lse,
        rstd_ptr=rstd,
        weight_ptr=output_weight,
        bias_ptr=aligned(output_bias, torch.float32),
        y_ptr=y,
        M=tokens,
        D=width,
        I=inner,
        num_heads=num_heads,
        channels_a_program=channels_a_program,
    )


def configurations() -> Iterator[Configuration]:
    for kernel in (query_forward, attention_forward, output_forward):
        yield from variants(kernel)
