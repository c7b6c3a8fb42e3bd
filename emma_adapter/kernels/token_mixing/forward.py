"""Token mixing, forward: packing the weights, and the product with virtual concatenation."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"
# ruff: noqa: N803 (sizes are upper-case in Triton code)

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import DTYPES, Configuration, aligned, cdiv, dot, rounded
from .tiles import (
    BLOCKS_ELEMENTWISE,
    all_finite,
    elementwise_grid,
    is_finite,
    packed_column,
    padded_size,
    product,
    round_up,
    tile_for,
    tiles_of,
)


@triton.jit(
    do_not_specialize=["N", "T", "image_stride", "text_stride"],
    do_not_specialize_on_alignment=["image_weight_ptr", "text_weight_ptr"],
)
def pack_weights(
    image_weight_ptr,  # float32 [N, N], rows image_stride apart
    text_weight_ptr,  # float32 [N, T], rows text_stride apart
    packed_ptr,  # out [padded N, K]: image weights from column 0, text weights from column padded N, zeros elsewhere
    N,
    T,
    K,
    image_stride,
    text_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PADDING: tl.constexpr,
):
    """Pack the weights; one program for BLOCK_M rows and BLOCK_N columns."""
    row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    column = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    t = column - padded_size(N, PADDING)
    image = tl.load(
        image_weight_ptr + row.to(tl.int64) * image_stride + column, mask=(row < N) & (column < N), other=0.0
    )
    text = tl.load(text_weight_ptr + row.to(tl.int64) * text_stride + t, mask=(row < N) & (t >= 0) & (t < T), other=0.0)
    weight = rounded(tl.where(t >= 0, text, image), packed_ptr.dtype.element_ty)
    # Rows and columns come in multiples of PADDING, which blocks divide.
    tl.store(packed_ptr + row * K + column, weight)


@triton.jit
def image_update(
    x_image,
    projected_image,
    weights,
    channels,
    N,
    T,
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PADDING: tl.constexpr,
    FINITE: tl.constexpr,
):
    """Return ``dW_img x + W_txt T'``, float32 ``[BLOCK_M, BLOCK_N]``.

    With FINITE, values of x that aren't finite count as zero.
    """
    channel_inside = (channels < D)[None, :]
    k = tl.arange(0, BLOCK_K)
    update = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    image_blocks = tl.cdiv(N, BLOCK_K)
    # FINITE rarely runs, and isn't worth the shared memory of a pipeline.
    stages: tl.constexpr = 1 if FINITE else None
    for block in tl.range(0, image_blocks + tl.cdiv(T, BLOCK_K), num_stages=stages):
        # First over x, then over T'; z stands for either.
        is_image = block < image_blocks
        z_rows = tl.where(is_image, block, block - image_blocks) * BLOCK_K + k
        z = tl.load(
            tl.where(is_image, x_image, projected_image) + (z_rows[:, None] * D + channels[None, :]),
            mask=(z_rows < tl.where(is_image, N, T))[:, None] & channel_inside,
            other=0.0,
        )
        if FINITE:
            z = tl.where(is_finite(z) | (not is_image), z, 0.0)
        weight = tl.load(weights + packed_column(block, N, BLOCK_K, PADDING))
        update = dot(weight, z, update)
    return update


@triton.jit(do_not_specialize=["N", "T"])
def mix_forward(
    x_ptr,  # [B, N, D]
    projected_ptr,  # [B, T, D]
    packed_ptr,  # [padded N, K]
    bias_ptr,  # float32 [N]
    y_ptr,  # out [B, N, D]
    N,
    T,
    D,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PADDING: tl.constexpr,
):
    """Compute y; one program for BLOCK_M tokens and BLOCK_N channels of one image.

    Programs that read the same channels of the same image are neighbours, so that these are still in L2.
    """
    row_blocks = tl.cdiv(N, BLOCK_M)
    channel_blocks = tl.cdiv(D, BLOCK_N)
    rows = tl.program_id(0) % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    channels = tl.program_id(0) // row_blocks % channel_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    image = (tl.program_id(0) // row_blocks // channel_blocks).to(tl.int64)
    channel_inside = (channels < D)[None, :]
    k = tl.arange(0, BLOCK_K)

    x_image = x_ptr + image * N * D
    projected_image = projected_ptr + image * T * D
    weights = packed_ptr + rows[:, None] * K + k[None, :]
    update = image_update(
        *(x_image, projected_image, weights, channels, N, T, D, BLOCK_M, BLOCK_N, BLOCK_K, PADDING, False)
    )
    # Even a weight of zero makes NaN of a value that isn't finite. Looking for those in the loop would slow it down.
    if not all_finite(update):
        update = image_update(
            *(x_image, projected_image, weights, channels, N, T, D, BLOCK_M, BLOCK_N, BLOCK_K, PADDING, True)
        )

    update += tl.load(bias_ptr + rows, mask=rows < N, other=0.0)[:, None]
    places = rows[:, None] * D + channels[None, :]
    inside = (rows < N)[:, None] & channel_inside
    x = tl.load(x_image + places, mask=inside, other=0.0)
    # An untrained adapter is the identity bit for bit; x + update would turn -0.0 into 0.0.
    y = tl.where(update != 0.0, rounded(x.to(tl.float32) + update, y_ptr.dtype.element_ty), x)
    tl.store(y_ptr + image * N * D + places, y, mask=inside)


# --- host ------------------------------------------------------------------------------------------------------


def mix(x: Tensor, projected: Tensor, image_weight: Tensor, text_weight: Tensor, bias: Tensor, y: Tensor) -> None:
    """Fill y ``[B, N, D]``."""
    batch, n, d = x.shape
    packed = pack(image_weight, text_weight, x.dtype)
    configuration = product(mix_forward, x.dtype, tile_for(batch, n, d))
    blocks = dict(configuration.constants)
    configuration.launch(
        (batch * cdiv(n, blocks["BLOCK_M"]) * cdiv(d, blocks["BLOCK_N"]),),
        x.device,
        x_ptr=aligned(x),
        projected_ptr=aligned(projected),
        packed_ptr=packed,
        bias_ptr=aligned(bias, torch.float32),
        y_ptr=y,
        N=n,
        T=projected.shape[1],
        D=d,
        K=packed.shape[1],
    )


def pack(image_weight: Tensor, text_weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the packed weights, ``[padded N, padded N + 128]`` in ``dtype``."""
    image_weight, text_weight = (_with_unit_stride(weight.detach().float()) for weight in (image_weight, text_weight))
    n, t = text_weight.shape
    padded = round_up(n)
    packed = torch.empty(padded, padded + round_up(t), dtype=dtype, device=image_weight.device)
    _packing(dtype).launch(
        elementwise_grid(*packed.shape),
        packed.device,
        image_weight_ptr=image_weight,
        text_weight_ptr=text_weight,
        packed_ptr=packed,
        N=n,
        T=t,
        K=packed.shape[1],
        image_stride=image_weight.stride(0),
        text_stride=text_weight.stride(0),
    )
    return packed


def configurations() -> Iterator[Configuration]:
    """Yield every variant that can be launched."""
    for dtype in DTYPES:
        yield _packing(dtype)
        yield from (product(mix_forward, dtype, tile) for tile in tiles_of(dtype))


@cache
def _packing(dtype: torch.dtype) -> Configuration:
    types = (("image_weight_ptr", torch.float32), ("text_weight_ptr", torch.float32))
    return Configuration(pack_weights, dtype, types, BLOCKS_ELEMENTWISE, 4, 1)


def _with_unit_stride(weight: Tensor) -> Tensor:
    """Return a weight with contiguous rows; these may lie apart, as in the first columns of a wider matrix."""
    return weight if weight.stride(1) == 1 else weight.contiguous()
