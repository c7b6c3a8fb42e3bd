"""Cross-attention, backward through the softmax: gradients of queries, keys, values and positions."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"
# ruff: noqa: E741, N803 (sizes are upper-case in Triton code)

from __future__ import annotations

import triton
import triton.language as tl

from ..launch import dot, rounded
from .tiles import LOG2_E, instruction_row, number_of_keys, segment_slice


@triton.jit
def softmax_tile(
    query,
    attended_grad,
    lse,
    key_ptr,
    value_ptr,
    key_mask_ptr,
    first_key,
    t,
    columns,
    column_inside,
    T,
    I,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Return keys t, the weights that queries give them, and the gradient of these; both 0 at padding."""
    valid = tl.load(key_mask_ptr + first_key + t, mask=t < T, other=0) != 0
    places = (first_key + t)[:, None] * I + columns[None, :]
    inside = valid[:, None] & column_inside[None, :]
    key = tl.load(key_ptr + places, mask=inside, other=0.0)
    value = tl.load(value_ptr + places, mask=inside, other=0.0)
    zeros = tl.zeros([BLOCK_M, BLOCK_T], tl.float32)
    scores = dot(query, tl.trans(key), zeros) * (scale * LOG2_E)
    weights = tl.where(valid[None, :], tl.exp2(scores - lse[:, None]), 0.0)
    weights_grad = tl.where(valid[None, :], dot(attended_grad, tl.trans(value), zeros), 0.0)
    return key, weights, weights_grad


@triton.jit(
    do_not_specialize=["N", "T", "num_heads", "num_segments", "search_steps", "shared"],
    do_not_specialize_on_alignment=["key_mask_ptr", "instruction_ptr", "cu_seqlens_ptr"],
)
def query_backward(
    query_ptr,  # [M, I]
    key_ptr,  # [R, T, I]
    value_ptr,  # [R, T, I]
    key_mask_ptr,  # uint8 [R, T]
    instruction_ptr,  # int32 [S]
    cu_seqlens_ptr,  # int32 [S + 1]
    attended_grad_ptr,  # [M, I]
    lse_ptr,  # float32 [M, H]
    delta_ptr,  # out float32 [M, H]: do . o, which the gradient of every score needs
    query_grad_ptr,  # out [M, I]
    N,  # tokens of every segment; 0 if cu_seqlens says how many
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
    """Compute dq, through the softmax; one program for one head and at most BLOCK_M tokens of one segment."""
    segment, start, stop = segment_slice(tl.program_id(0), cu_seqlens_ptr, N, num_segments, search_steps, BLOCK_M)
    if start >= stop:
        return
    head = tl.program_id(1)
    rows = start + tl.arange(0, BLOCK_M)
    channels = tl.arange(0, BLOCK_H)
    inside = (rows < stop)[:, None] & (channels < head_dim)[None, :]
    places = rows.to(tl.int64)[:, None] * I + head * head_dim + channels[None, :]
    query = tl.load(query_ptr + places, mask=inside, other=0.0)
    attended_grad = tl.load(attended_grad_ptr + places, mask=inside, other=0.0)
    lse = tl.load(lse_ptr + rows.to(tl.int64) * num_heads + head, mask=rows < stop, other=0.0)
    first_key = instruction_row(segment, instruction_ptr, shared).to(tl.int64) * T
    key_columns = head * head_dim + channels
    column_inside = channels < head_dim
    keys = number_of_keys(key_mask_ptr, first_key, T)
    # do . o is computed as the sum that it stands for: from the rounded o, it would be off by as much as small
    # gradients are large. The weights, computed again from a rounded sum, don't add up to exactly 1. Where one of them
    # is nearly 1, the gradient of its score is a small difference, from which the error of their sum must be kept out.
    delta = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for first in range(0, keys, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        key, weights, weights_grad = softmax_tile(
            *(query, attended_grad, lse, key_ptr, value_ptr, key_mask_ptr, first_key, t, key_columns, column_inside),
            *(T, I, scale, BLOCK_M, BLOCK_T),
        )
        delta += tl.sum(weights * weights_grad, 1)
        total += tl.sum(weights, 1)
    delta = delta / tl.where(total == 0.0, 1.0, total)
    query_grad = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    for first in range(0, keys, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        key, weights, weights_grad = softmax_tile(
            *(query, attended_grad, lse, key_ptr, value_ptr, key_mask_ptr, first_key, t, key_columns, column_inside),
            *(T, I, scale, BLOCK_M, BLOCK_T),
        )
        scores_grad = weights * (weights_grad - delta[:, None])
        query_grad = dot(rounded(scores_grad, query.dtype), key, query_grad)
    tl.store(delta_ptr + rows.to(tl.int64) * num_heads + head, delta, mask=rows < stop)
    tl.store(query_grad_ptr + places, rounded(query_grad * scale, query_grad_ptr.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=["N", "T", "num_heads", "num_segments", "search_steps", "shared"],
    do_not_specialize_on_alignment=["key_mask_ptr", "instruction_ptr", "cu_seqlens_ptr"],
)
def key_value_backward(
    query_ptr,  # [M, I]
    key_ptr,  # [R, T, I]
    value_ptr,  # [R, T, I]
    key_mask_ptr,  # uint8 [R, T]
    instruction_ptr,  # int32 [S]
    cu_seqlens_ptr,  # int32 [S + 1]
    attended_grad_ptr,  # [M, I]
    lse_ptr,  # float32 [M, H]
    delta_ptr,  # float32 [M, H]
    key_partial_ptr,  # out float32 [slots, T, I]
    value_partial_ptr,  # out float32, the same
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
    CHUNK: tl.constexpr,
):
    """Compute dK and dV, through the softmax, of BLOCK_T keys, summed over at most CHUNK tokens of one segment.

    The program's number is the place of its sum: no two programs write to the same one, and none need be zeroed before.
    """
    slot = tl.program_id(0)
    segment, start, stop = segment_slice(slot, cu_seqlens_ptr, N, num_segments, search_steps, CHUNK)
    if start >= stop:
        return
    head = tl.program_id(1)
    t = tl.program_id(2) * BLOCK_T + tl.arange(0, BLOCK_T)
    channels = tl.arange(0, BLOCK_H)
    first_key = instruction_row(segment, instruction_ptr, shared).to(tl.int64) * T
    valid = tl.load(key_mask_ptr + first_key + t, mask=t < T, other=0) != 0
    key_places = (first_key + t)[:, None] * I + head * head_dim + channels[None, :]
    key_inside = valid[:, None] & (channels < head_dim)[None, :]
    key = tl.load(key_ptr + key_places, mask=key_inside, other=0.0)
    value = tl.load(value_ptr + key_places, mask=key_inside, other=0.0)
    key_grad = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    value_grad = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    # Where all keys are padding, there is nothing to sum.
    stop = tl.where(tl.max(valid.to(tl.int32), 0) == 0, start, stop)
    for first in range(start, stop, BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)
        row_inside = rows < stop
        inside = row_inside[:, None] & (channels < head_dim)[None, :]
        places = rows.to(tl.int64)[:, None] * I + head * head_dim + channels[None, :]
        query = tl.load(query_ptr + places, mask=inside, other=0.0)
        attended_grad = tl.load(attended_grad_ptr + places, mask=inside, other=0.0)
        statistics = rows.to(tl.int64) * num_heads + head
        lse = tl.load(lse_ptr + statistics, mask=row_inside, other=0.0)
        delta = tl.load(delta_ptr + statistics, mask=row_inside, other=0.0)
        zeros = tl.zeros([BLOCK_T, BLOCK_M], tl.float32)
        scores = dot(key, tl.trans(query), zeros) * (scale * LOG2_E)
        counts = valid[:, None] & row_inside[None, :]
        weights = tl.where(counts, tl.exp2(scores - lse[None, :]), 0.0)
        weights_grad = dot(value, tl.trans(attended_grad), zeros)
        scores_grad = tl.where(counts, weights * (weights_grad - delta[None, :]), 0.0)
        value_grad = dot(rounded(weights, query.dtype), attended_grad, value_grad)
        key_grad = dot(rounded(scores_grad, query.dtype), query, key_grad)
    partial_places = (slot.to(tl.int64) * T + t)[:, None] * I + head * head_dim + channels[None, :]
    partial_inside = (t < T)[:, None] & (channels < head_dim)[None, :]
    # Rows of padding are 0 even where a query is not finite.
    tl.store(key_partial_ptr + partial_places, tl.where(valid[:, None], key_grad * scale, 0.0), mask=partial_inside)
    tl.store(value_partial_ptr + partial_places, tl.where(valid[:, None], value_grad, 0.0), mask=partial_inside)


@triton.jit(
    do_not_specialize=["N", "width", "num_segments", "shared"],
    do_not_specialize_on_alignment=["instruction_ptr", "cu_seqlens_ptr"],
)
def key_value_sum(
    key_partial_ptr,  # float32 [slots, T * I]
    value_partial_ptr,  # float32 [slots, T * I]
    instruction_ptr,  # int32 [S]
    cu_seqlens_ptr,  # int32 [S + 1]
    key_grad_ptr,  # out [R, T * I]
    value_grad_ptr,  # out [R, T * I]
    N,
    width,  # T * I
    num_segments,
    shared,
    CHUNK: tl.constexpr,
    BLOCK_SUM: tl.constexpr,
):
    """Add the partial sums of all segments that share an instruction; for an instruction and BLOCK_SUM numbers."""
    row = tl.program_id(0)
    places = tl.program_id(1) * BLOCK_SUM + tl.arange(0, BLOCK_SUM)
    inside = places < width
    key_grad = tl.zeros([BLOCK_SUM], tl.float32)
    value_grad = tl.zeros([BLOCK_SUM], tl.float32)
    # An instruction that isn't shared has one segment, if any.
    first_segment = tl.where(shared != 0, 0, row)
    last_segment = tl.where(shared != 0, num_segments, row + 1)
    for segment in range(first_segment, last_segment):
        if instruction_row(segment, instruction_ptr, shared) == row:
            if N > 0:
                chunks = tl.cdiv(N, CHUNK)
                first_slot = segment * chunks
                last_slot = first_slot + chunks
            else:
                start = tl.load(cu_seqlens_ptr + segment)
                stop = tl.load(cu_seqlens_ptr + segment + 1)
                first_slot = segment + start // CHUNK
                last_slot = tl.where(start < stop, segment + (stop - 1) // CHUNK + 1, first_slot)
            for slot in range(first_slot, last_slot):
                partial = slot * width.to(tl.int64) + places
                key_grad += tl.load(key_partial_ptr + partial, mask=inside, other=0.0)
                value_grad += tl.load(value_partial_ptr + partial, mask=inside, other=0.0)
    out = row.to(tl.int64) * width + places
    tl.store(key_grad_ptr + out, rounded(key_grad, key_grad_ptr.dtype.element_ty), mask=inside)
    tl.store(value_grad_ptr + out, rounded(value_grad, value_grad_ptr.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=["P", "num_segments"],
    do_not_specialize_on_alignment=["position_start_ptr", "cu_seqlens_ptr"],
)
def position_backward(
    query_grad_ptr,  # [M, I]
    position_start_ptr,  # int32 [S]
    cu_seqlens_ptr,  # int32 [S + 1]
    position_grad_ptr,  # out float32 [P, I]
    P,
    I,
    num_segments,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Sum dq over the segments that use a position; one program for BLOCK_M positions and BLOCK_T columns."""
    positions = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inner = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    gradient = tl.zeros([BLOCK_M, BLOCK_T], tl.float32)
    for segment in range(num_segments):
        start = tl.load(cu_seqlens_ptr + segment)
        rows = start + positions - tl.load(position_start_ptr + segment)
        used = (rows >= start) & (rows < tl.load(cu_seqlens_ptr + segment + 1)) & (positions < P)
        gradient += tl.load(
            query_grad_ptr + rows.to(tl.int64)[:, None] * I + inner[None, :],
            mask=used[:, None] & (inner < I)[None, :],
            other=0.0,
        ).to(tl.float32)
    tl.store(
        position_grad_ptr + positions.to(tl.int64)[:, None] * I + inner[None, :],
        gradient,
        mask=(positions < P)[:, None] & (inner < I)[None, :],
    )
