"""Cross-attention, backward through the output projection, the query projection and LayerNorm."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"
# ruff: noqa: E741, N803 (sizes are upper-case in Triton code)

from __future__ import annotations

import triton
import triton.language as tl

from ..launch import dot, rounded
from .tiles import attended_tile, output_tile, updated_rows, weight_tile


@triton.jit
def through_gate(gradient, x, z):
    """Return the gradient of the update z from that of ``x 2 sigmoid(z)``."""
    gate = tl.sigmoid(z)
    return gradient * x * (2.0 * gate * (1.0 - gate))


@triton.jit
def normalised(x_ptr, center_ptr, rstd_ptr, rows, row_inside, channels, D):
    """Return LN(x) before its scale and shift, float32 ``[rows, channels]``; 0 outside of ``row_inside``."""
    x_rows = x_ptr + rows.to(tl.int64) * D
    inside = row_inside[:, None] & (channels < D)[None, :]
    x = tl.load(x_rows[:, None] + channels[None, :], mask=inside, other=0.0).to(tl.float32)
    reference = tl.load(center_ptr + rows.to(tl.int64) * 2, mask=row_inside, other=0.0)
    center = tl.load(center_ptr + rows.to(tl.int64) * 2 + 1, mask=row_inside, other=0.0)
    rstd = tl.load(rstd_ptr + rows, mask=row_inside, other=0.0)
    return tl.where(inside, (x - reference[:, None] - center[:, None]) * rstd[:, None], 0.0)


@triton.jit(do_not_specialize=["M", "num_heads"])
def output_backward(
    grad_ptr,  # [M, D]
    x_ptr,  # [M, D]
    attended_ptr,  # [M, I]
    lse_ptr,  # float32 [M, H]
    rstd_ptr,  # float32 [M]
    weight_ptr,  # [D, I]
    bias_ptr,  # float32 [D]
    attended_grad_ptr,  # out [M, I]
    M,
    D,
    I,
    num_heads,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_I: tl.constexpr,
    MODULATE: tl.constexpr,
    ONE_TILE: tl.constexpr,
):
    """Compute ``do = dz W_o``; one program for BLOCK_M tokens and BLOCK_I columns.

    With ONE_TILE, I is at most BLOCK_I: o is read once, and a tile of W_o serves z and do.
    """
    inner_blocks = tl.cdiv(I, BLOCK_I)
    rows = tl.program_id(0) // inner_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    inner = tl.program_id(0) % inner_blocks * BLOCK_I + tl.arange(0, BLOCK_I)
    updated = updated_rows(lse_ptr, rstd_ptr, rows, rows < M, num_heads)
    attended_grad = tl.zeros([BLOCK_M, BLOCK_I], tl.float32)
    first_inner = tl.program_id(0) % inner_blocks * BLOCK_I
    if MODULATE and ONE_TILE:
        attended = attended_tile(attended_ptr, rows, updated, 0, I, BLOCK_I)
    for first in range(0, D, BLOCK_D):
        channels = first + tl.arange(0, BLOCK_D)
        places = rows.to(tl.int64)[:, None] * D + channels[None, :]
        inside = updated[:, None] & (channels < D)[None, :]
        dz = tl.load(grad_ptr + places, mask=inside, other=0.0).to(tl.float32)
        weight = weight_tile(weight_ptr, channels, first_inner, D, I, BLOCK_I)
        if MODULATE:
            if ONE_TILE:
                z = dot(attended, tl.trans(weight), tl.zeros([BLOCK_M, BLOCK_D], tl.float32))
                z += tl.load(bias_ptr + channels, mask=channels < D, other=0.0)[None, :]
            else:
                z = output_tile(
                    *(attended_ptr, weight_ptr, bias_ptr, rows, updated, channels, D, I, BLOCK_M, BLOCK_D, BLOCK_I)
                )
            dz = through_gate(dz, tl.load(x_ptr + places, mask=inside, other=0.0).to(tl.float32), z)
        attended_grad = dot(rounded(dz, x_ptr.dtype.element_ty), weight, attended_grad)
    tl.store(
        attended_grad_ptr + rows.to(tl.int64)[:, None] * I + inner[None, :],
        rounded(attended_grad, x_ptr.dtype.element_ty),
        mask=(rows < M)[:, None] & (inner < I)[None, :],
    )


@triton.jit(do_not_specialize=["M", "num_heads", "rows_per_split"])
def query_weight_backward(
    x_ptr,  # [M, D]
    center_ptr,  # float32 [M, 2]
    rstd_ptr,  # float32 [M]
    lse_ptr,  # float32 [M, H]
    query_grad_ptr,  # [M, I]
    weight_partial_ptr,  # out float32 [splits, I, D]
    M,
    D,
    I,
    num_heads,
    rows_per_split,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Compute ``dq^T x_hat``, x_hat being LN(x) before scale and shift; a tile of W_q over a split of the tokens."""
    channel_blocks = tl.cdiv(D, BLOCK_D)
    channels = tl.program_id(0) % channel_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    inner = tl.program_id(0) // channel_blocks * BLOCK_I + tl.arange(0, BLOCK_I)
    split = tl.program_id(1)
    weight_grad = tl.zeros([BLOCK_I, BLOCK_D], tl.float32)
    stop = tl.minimum(split * rows_per_split + rows_per_split, M)
    for first in range(split * rows_per_split, stop, BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)
        updated = updated_rows(lse_ptr, rstd_ptr, rows, rows < stop, num_heads)
        query_grad = tl.load(
            query_grad_ptr + rows.to(tl.int64)[:, None] * I + inner[None, :],
            mask=updated[:, None] & (inner < I)[None, :],
            other=0.0,
        )
        x_hat = normalised(x_ptr, center_ptr, rstd_ptr, rows, updated, channels, D)
        weight_grad = dot(tl.trans(query_grad), rounded(x_hat, x_ptr.dtype.element_ty), weight_grad)
    tl.store(
        weight_partial_ptr + (split.to(tl.int64) * I + inner)[:, None] * D + channels[None, :],
        weight_grad,
        mask=(inner < I)[:, None] & (channels < D)[None, :],
    )


@triton.jit(do_not_specialize=["M", "num_heads", "rows_per_split"])
def output_weight_backward(
    grad_ptr,  # [M, D]
    x_ptr,  # [M, D]
    attended_ptr,  # [M, I]
    lse_ptr,  # float32 [M, H]
    rstd_ptr,  # float32 [M]
    weight_ptr,  # [D, I]
    bias_ptr,  # float32 [D]
    weight_partial_ptr,  # out float32 [splits, D, I]
    bias_partial_ptr,  # out float32 [splits, D]
    M,
    D,
    I,
    num_heads,
    rows_per_split,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_I: tl.constexpr,
    MODULATE: tl.constexpr,
    ONE_TILE: tl.constexpr,
):
    """Compute ``dz^T o`` and the sum of dz, over ``rows_per_split`` tokens, BLOCK_D channels, BLOCK_I columns.

    dz^T is computed as such, from ``z^T = W_o o^T``: compilers were seen to transpose the result of a product wrongly.
    With ONE_TILE, I is at most BLOCK_I: W_o is read once, and a tile of o serves z and the gradient.
    """
    channel_blocks = tl.cdiv(D, BLOCK_D)
    channels = tl.program_id(0) % channel_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    inner = tl.program_id(0) // channel_blocks * BLOCK_I + tl.arange(0, BLOCK_I)
    split = tl.program_id(1)
    weight_grad = tl.zeros([BLOCK_D, BLOCK_I], tl.float32)
    bias_grad = tl.zeros([BLOCK_D], tl.float32)
    stop = tl.minimum(split * rows_per_split + rows_per_split, M)
    first_inner = tl.program_id(0) // channel_blocks * BLOCK_I
    if MODULATE:
        bias = tl.load(bias_ptr + channels, mask=channels < D, other=0.0)
        if ONE_TILE:
            weight = weight_tile(weight_ptr, channels, 0, D, I, BLOCK_I)
    for first in range(split * rows_per_split, stop, BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)
        updated = updated_rows(lse_ptr, rstd_ptr, rows, rows < stop, num_heads)
        places = rows.to(tl.int64)[None, :] * D + channels[:, None]
        inside = updated[None, :] & (channels < D)[:, None]
        dz = tl.load(grad_ptr + places, mask=inside, other=0.0).to(tl.float32)
        attended = attended_tile(attended_ptr, rows, updated, first_inner, I, BLOCK_I)
        if MODULATE:
            if ONE_TILE:
                z = dot(weight, tl.trans(attended), tl.zeros([BLOCK_D, BLOCK_M], tl.float32))
            else:
                z = tl.zeros([BLOCK_D, BLOCK_M], tl.float32)
                for column in range(0, I, BLOCK_I):
                    every_attended = attended_tile(attended_ptr, rows, updated, column, I, BLOCK_I)
                    every_weight = weight_tile(weight_ptr, channels, column, D, I, BLOCK_I)
                    z = dot(every_weight, tl.trans(every_attended), z)
            x = tl.load(x_ptr + places, mask=inside, other=0.0).to(tl.float32)
            dz = through_gate(dz, x, z + bias[:, None])
        weight_grad = dot(rounded(dz, x_ptr.dtype.element_ty), attended, weight_grad)
        bias_grad += tl.sum(dz, 1)
    tl.store(
        weight_partial_ptr + (split.to(tl.int64) * D + channels)[:, None] * I + inner[None, :],
        weight_grad,
        mask=(channels < D)[:, None] & (inner < I)[None, :],
    )
    if tl.program_id(0) < channel_blocks:
        tl.store(bias_partial_ptr + split.to(tl.int64) * D + channels, bias_grad, mask=channels < D)


@triton.jit
def normed_gradient(
    query_grad_ptr,  # [M, I]
    weight_ptr,  # [I, D]
    norm_weight_ptr,  # float32 [D]
    rows,
    row_inside,
    channels,
    D,
    I,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Return ``dq W_q`` times the scale of the norm: the gradient of x_hat, float32 ``[BLOCK_M, BLOCK_D]``."""
    gradient = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(0, I, BLOCK_I):
        inner = first + tl.arange(0, BLOCK_I)
        query_grad = tl.load(
            query_grad_ptr + rows.to(tl.int64)[:, None] * I + inner[None, :],
            mask=row_inside[:, None] & (inner < I)[None, :],
            other=0.0,
        )
        weight = tl.load(
            weight_ptr + inner[:, None] * D + channels[None, :],
            mask=(inner < I)[:, None] & (channels < D)[None, :],
            other=0.0,
        )
        gradient = dot(query_grad, weight, gradient)
    return gradient * tl.load(norm_weight_ptr + channels, mask=channels < D, other=0.0)[None, :]


@triton.jit(do_not_specialize=["M", "num_heads"])
def visual_backward(
    grad_ptr,  # [M, D]
    x_ptr,  # [M, D]
    center_ptr,  # float32 [M, 2]
    rstd_ptr,  # float32 [M]
    lse_ptr,  # float32 [M, H]
    query_grad_ptr,  # [M, I]
    query_weight_ptr,  # [I, D]
    norm_weight_ptr,  # float32 [D]
    attended_ptr,  # [M, I]
    weight_ptr,  # [D, I]
    bias_ptr,  # float32 [D]
    x_grad_ptr,  # out [M, D]
    M,
    D,
    I,
    num_heads,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_I: tl.constexpr,
    MODULATE: tl.constexpr,
):
    """Compute dx, through the residual and through LayerNorm; one program for BLOCK_M tokens."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    updated = updated_rows(lse_ptr, rstd_ptr, rows, rows < M, num_heads)
    rstd = tl.load(rstd_ptr + rows, mask=updated, other=0.0)

    # LayerNorm's gradient needs two means over all channels. The product with W_q is cheaper to repeat than to keep.
    mean = tl.zeros([BLOCK_M], tl.float32)
    projection = tl.zeros([BLOCK_M], tl.float32)
    for first in range(0, D, BLOCK_D):
        channels = first + tl.arange(0, BLOCK_D)
        gradient = normed_gradient(
            *(query_grad_ptr, query_weight_ptr, norm_weight_ptr, rows, updated, channels, D, I),
            *(BLOCK_M, BLOCK_D, BLOCK_I),
        )
        x_hat = normalised(x_ptr, center_ptr, rstd_ptr, rows, updated, channels, D)
        mean += tl.sum(gradient, 1)
        projection += tl.sum(gradient * x_hat, 1)
    mean = mean / D
    projection = projection / D

    for first in range(0, D, BLOCK_D):
        channels = first + tl.arange(0, BLOCK_D)
        gradient = normed_gradient(
            *(query_grad_ptr, query_weight_ptr, norm_weight_ptr, rows, updated, channels, D, I),
            *(BLOCK_M, BLOCK_D, BLOCK_I),
        )
        x_hat = normalised(x_ptr, center_ptr, rstd_ptr, rows, updated, channels, D)
        gradient = (gradient - mean[:, None] - x_hat * projection[:, None]) * rstd[:, None]
        places = rows.to(tl.int64)[:, None] * D + channels[None, :]
        inside = (rows < M)[:, None] & (channels < D)[None, :]
        y_grad = tl.load(grad_ptr + places, mask=inside, other=0.0)
        residual = y_grad.to(tl.float32)
        if MODULATE:
            z = output_tile(
                *(attended_ptr, weight_ptr, bias_ptr, rows, updated, channels, D, I),
                *(BLOCK_M, BLOCK_D, BLOCK_I),
            )
            residual = residual * (2.0 * tl.sigmoid(z))
        x_grad = rounded(residual + gradient, x_grad_ptr.dtype.element_ty)
        tl.store(x_grad_ptr + places, tl.where(updated[:, None], x_grad, y_grad), mask=inside)
