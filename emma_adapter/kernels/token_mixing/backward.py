"""Token mixing, backward: gradients of the inputs, and of the weights in parts that are added in a fixed order."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"
# ruff: noqa: N803 (sizes are upper-case in Triton code)

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import DTYPES, Configuration, cdiv, dot, rounded
from .tiles import (
    BLOCKS_ELEMENTWISE,
    all_finite,
    elementwise_grid,
    is_finite,
    packed_column,
    padded_size,
    product,
    round_up,
    splits_for,
    tile_for,
    tiles_of,
)


@triton.jit(do_not_specialize=["N", "T", "first_block", "row_blocks"])
def mix_backward_inputs(
    dy_ptr,  # [B, N, D]
    packed_ptr,  # [padded N, K]
    dx_ptr,  # out [B, N, D]
    dprojected_ptr,  # out [B, T, D]
    N,
    T,
    D,
    K,
    first_block,
    row_blocks,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PADDING: tl.constexpr,
):
    """Compute ``dx = dy + dW_img^T dy`` and ``dT' = W_txt^T dy``.

    One program for BLOCK_M packed columns, which are all of one kind, and BLOCK_N channels of one image.
    """
    channel_blocks = tl.cdiv(D, BLOCK_N)
    column = packed_column(first_block + tl.program_id(0) % row_blocks, N, BLOCK_M, PADDING)
    channels = tl.program_id(0) // row_blocks % channel_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    image = (tl.program_id(0) // row_blocks // channel_blocks).to(tl.int64)
    channel_inside = (channels < D)[None, :]
    rows = tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)

    gradient = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    dy_image = dy_ptr + image * N * D
    weights = packed_ptr + k[:, None] * K + (column + rows)[None, :]
    for first in range(0, N, BLOCK_K):
        weight = tl.load(weights + first * K)
        dy = tl.load(
            dy_image + (first + k)[:, None] * D + channels[None, :],
            mask=(first + k < N)[:, None] & channel_inside,
            other=0.0,
        )
        gradient = dot(tl.trans(weight), dy, gradient)

    text_column = column - padded_size(N, PADDING)
    if text_column < 0:
        rows += column
        places = rows[:, None] * D + channels[None, :]
        inside = (rows < N)[:, None] & channel_inside
        gradient += tl.load(dy_image + places, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + image * N * D + places, rounded(gradient, dx_ptr.dtype.element_ty), mask=inside)
    else:
        rows += text_column
        places = rows[:, None] * D + channels[None, :]
        inside = (rows < T)[:, None] & channel_inside
        tl.store(
            dprojected_ptr + image * T * D + places, rounded(gradient, dprojected_ptr.dtype.element_ty), mask=inside
        )


@triton.jit
def weight_products(
    dy_ptr,
    z_ptr,
    rows,
    z_rows,
    N,
    num_z,
    D,
    first_chunk,
    last_chunk,
    with_sum,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FINITE: tl.constexpr,
):
    """Return ``dy z^T``, float32 ``[BLOCK_M, BLOCK_N]``, and the sum of dy over channels.

    With FINITE, values of z that aren't finite count as zero.
    """
    k = tl.arange(0, BLOCK_K)
    product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    chunks_an_image = tl.cdiv(D, BLOCK_K)
    first_image = tl.full([], 0, tl.int64)
    stages: tl.constexpr = 1 if FINITE else None
    for chunk in tl.range(first_chunk, last_chunk, num_stages=stages):
        image = first_image + chunk // chunks_an_image
        channels = chunk % chunks_an_image * BLOCK_K + k
        channel_inside = (channels < D)[None, :]
        dy = tl.load(
            dy_ptr + image * N * D + (rows[:, None] * D + channels[None, :]),
            mask=(rows < N)[:, None] & channel_inside,
            other=0.0,
        )
        z = tl.load(
            z_ptr + image * num_z * D + (z_rows[:, None] * D + channels[None, :]),
            mask=(z_rows < num_z)[:, None] & channel_inside,
            other=0.0,
        )
        if FINITE:
            z = tl.where(is_finite(z), z, 0.0)
        product = dot(dy, tl.trans(z), product)
        if with_sum:
            row_sum += tl.sum(dy.to(tl.float32), 1)
    return product, row_sum


@triton.jit(do_not_specialize=["N", "T", "column_blocks", "num_chunks", "chunks_a_split"])
def mix_backward_weights(
    dy_ptr,  # [B, N, D]
    x_ptr,  # [B, N, D]
    projected_ptr,  # [B, T, D]
    partial_ptr,  # out float32 [splits, padded N, K]
    partial_bias_ptr,  # out float32 [splits, padded N]
    N,
    T,
    D,
    K,
    column_blocks,
    num_chunks,
    chunks_a_split,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PADDING: tl.constexpr,
):
    """Compute ``dy [x ; T']^T`` over one split of the images and channels; one program for a block of weights."""
    padded = padded_size(N, PADDING)
    column_block = tl.program_id(0) % column_blocks
    row = tl.program_id(0) // column_blocks * BLOCK_M
    column = packed_column(column_block, N, BLOCK_N, PADDING)
    split = tl.program_id(1)
    first_chunk = split * chunks_a_split
    last_chunk = tl.minimum(first_chunk + chunks_a_split, num_chunks)
    # The bias needs only the sum of dy, which one column of programs reads anyway.
    with_sum = column_block == 0
    # The block's columns belong to visual tokens or to instruction tokens, z [B, num_z, D].
    is_image = column < padded
    z_ptr = tl.where(is_image, x_ptr, projected_ptr)
    num_z = tl.where(is_image, N, T)

    rows = row + tl.arange(0, BLOCK_M)
    columns = column + tl.arange(0, BLOCK_N)
    z_rows = columns - tl.where(is_image, 0, padded)
    product, row_sum = weight_products(
        *(dy_ptr, z_ptr, rows, z_rows, N, num_z, D, first_chunk, last_chunk, with_sum, BLOCK_M, BLOCK_N, BLOCK_K, False)
    )
    # As in forward, visual tokens that aren't finite have no part in the update.
    if is_image & (not all_finite(product)):
        product, _ = weight_products(
            *(dy_ptr, z_ptr, rows, z_rows, N, num_z, D, first_chunk, last_chunk, False),
            *(BLOCK_M, BLOCK_N, BLOCK_K, True),
        )
    tl.store(partial_ptr + split.to(tl.int64) * padded * K + (rows[:, None] * K + columns[None, :]), product)
    if with_sum:
        tl.store(partial_bias_ptr + split.to(tl.int64) * padded + rows, row_sum)


@triton.jit(do_not_specialize=["N", "T", "splits"])
def add_splits(
    partial_ptr,  # float32 [splits, padded N, K]
    partial_bias_ptr,  # float32 [splits, padded N]
    dimage_weight_ptr,  # out float32 [N, N]
    dtext_weight_ptr,  # out float32 [N, T]
    dbias_ptr,  # out float32 [N]
    N,
    T,
    K,
    splits,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PADDING: tl.constexpr,
):
    """Add the splits up, first to last; one program for BLOCK_M rows and BLOCK_N columns."""
    padded = padded_size(N, PADDING)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = rows[:, None]
    column = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    t = column - padded
    is_image = (row < N) & (column < N)
    is_text = (row < N) & (t >= 0) & (t < T)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    total_bias = tl.zeros([BLOCK_M], tl.float32)
    partial = partial_ptr + row * K + column
    partial_bias = partial_bias_ptr + rows
    for _ in range(0, splits):
        total += tl.load(partial, mask=is_image | is_text, other=0.0)
        total_bias += tl.load(partial_bias, mask=rows < N, other=0.0)
        partial += padded * K
        partial_bias += padded
    tl.store(dimage_weight_ptr + row * N + column, total, mask=is_image)
    tl.store(dtext_weight_ptr + row * T + t, total, mask=is_text)
    if tl.program_id(1) == 0:
        tl.store(dbias_ptr + rows, total_bias, mask=rows < N)


# --- host ------------------------------------------------------------------------------------------------------


def input_gradients(dy: Tensor, packed: Tensor, dx: Tensor | None, dprojected: Tensor | None) -> None:
    batch, n, d = dy.shape
    t = 0 if dprojected is None else dprojected.shape[1]
    configuration = product(mix_backward_inputs, dy.dtype, tile_for(batch, t if dx is None else n + t, d))
    blocks = dict(configuration.constants)
    image_blocks = cdiv(n, blocks["BLOCK_M"])
    # The blocks of x are skipped if it needs no gradient, which is usual: the vision tower is frozen.
    first_block = image_blocks if dx is None else 0
    row_blocks = image_blocks - first_block + cdiv(t, blocks["BLOCK_M"])
    configuration.launch(
        (batch * row_blocks * cdiv(d, blocks["BLOCK_N"]),),
        dy.device,
        dy_ptr=dy,
        packed_ptr=packed,
        # Where no gradient is needed, none is written; the pointer must only be of the right type.
        dx_ptr=dy if dx is None else dx,
        dprojected_ptr=dy if dprojected is None else dprojected,
        N=n,
        T=t,
        D=d,
        K=packed.shape[1],
        first_block=first_block,
        row_blocks=row_blocks,
    )


def weight_gradients(
    dy: Tensor, x: Tensor, projected: Tensor, dimage_weight: Tensor, dtext_weight: Tensor, dbias: Tensor
) -> None:
    batch, n, d = x.shape
    t = projected.shape[1]
    padded, k = round_up(n), round_up(n) + round_up(t)
    configuration = product(mix_backward_weights, x.dtype, "large")
    blocks = dict(configuration.constants)
    column_blocks = cdiv(n, blocks["BLOCK_N"]) + cdiv(t, blocks["BLOCK_N"])
    weight_blocks = cdiv(n, blocks["BLOCK_M"]) * column_blocks
    num_chunks = batch * cdiv(d, blocks["BLOCK_K"])
    splits, chunks_a_split = splits_for(num_chunks, weight_blocks)
    partial = torch.empty(splits, padded, k, dtype=torch.float32, device=x.device)
    partial_bias = torch.empty(splits, padded, dtype=torch.float32, device=x.device)
    configuration.launch(
        (weight_blocks, splits),
        x.device,
        dy_ptr=dy,
        x_ptr=x,
        projected_ptr=projected,
        partial_ptr=partial,
        partial_bias_ptr=partial_bias,
        N=n,
        T=t,
        D=d,
        K=k,
        column_blocks=column_blocks,
        num_chunks=num_chunks,
        chunks_a_split=chunks_a_split,
    )
    _adding().launch(
        elementwise_grid(n, k),
        x.device,
        partial_ptr=partial,
        partial_bias_ptr=partial_bias,
        dimage_weight_ptr=dimage_weight,
        dtext_weight_ptr=dtext_weight,
        dbias_ptr=dbias,
        N=n,
        T=t,
        K=k,
        splits=splits,
    )


def configurations() -> Iterator[Configuration]:
    """Yield every variant that can be launched."""
    yield _adding()
    for dtype in DTYPES:
        yield product(mix_backward_weights, dtype, "large")
        yield from (product(mix_backward_inputs, dtype, tile) for tile in tiles_of(dtype))


@cache
def _adding() -> Configuration:
    return Configuration(add_splits, torch.float32, (), BLOCKS_ELEMENTWISE, 4, 1)
