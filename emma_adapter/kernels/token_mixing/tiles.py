"""Shared by forward and backward of token mixing: how weights are packed, and the one table of tile sizes."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"
# ruff: noqa: N803 (sizes are upper-case in Triton code)

from __future__ import annotations

from functools import cache
from typing import Any, Literal

import torch
import triton
import triton.language as tl

from ..launch import Configuration, cdiv

#: The most instruction tokens. CLIP's text tower has 77.
MAX_INSTRUCTION_TOKENS = 128
#: Rows of packed weights, and the columns of either part, come in multiples of this.
PADDING = 128

Tile = Literal["small", "large"]


@triton.jit
def padded_size(N, PADDING: tl.constexpr):
    """Return the number of rows of packed weights, which is also the column where those of the text begin."""
    return (N + PADDING - 1) // PADDING * PADDING


@triton.jit
def packed_column(block, N, BLOCK: tl.constexpr, PADDING: tl.constexpr):
    """Return the first column of a block; blocks that are all padding are skipped."""
    column = block * BLOCK
    image_columns = (N + BLOCK - 1) // BLOCK * BLOCK
    return tl.where(column < image_columns, column, column - image_columns + padded_size(N, PADDING))


@triton.jit
def is_finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def all_finite(x):
    return tl.min(tl.min(is_finite(x).to(tl.int32), 1), 0) == 1


# BLOCK_M, BLOCK_N, BLOCK_K, warps, stages of the three products. Of what compiles without spills for every target,
# estimated from memory traffic; not tuned on a GPU.
_BLOCKS: dict[Tile, tuple[int, int, int, int, int]] = {"large": (128, 128, 64, 8, 3), "small": (64, 64, 64, 4, 3)}
_BLOCKS_FLOAT32 = (64, 64, 16, 4, 3)
BLOCKS_ELEMENTWISE = (("BLOCK_M", 32), ("BLOCK_N", 128), ("PADDING", PADDING))
# Programs that keep a GPU of 132 to 304 multiprocessors busy.
_MANY_PROGRAMS = 264
_MAX_SPLITS = 32


@cache
def product(kernel: Any, dtype: torch.dtype, tile: Tile) -> Configuration:
    """Return the variant of one of the three products for a dtype and a tile."""
    *blocks, warps, stages = _BLOCKS_FLOAT32 if dtype == torch.float32 else _BLOCKS[tile]
    if (kernel.fn.__name__, dtype) == ("mix_backward_weights", torch.float32):
        warps, stages = 8, 2  # Four and three spill on sm_100.
    types = tuple((f"{name}_ptr", torch.float32) for name in ("bias", "partial", "partial_bias"))
    constants = (*zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), blocks, strict=True), ("PADDING", PADDING))
    return Configuration(kernel, dtype, types, constants, warps, stages)


def tiles_of(dtype: torch.dtype) -> tuple[Tile, ...]:
    return ("large",) if dtype == torch.float32 else ("large", "small")


def tile_for(batch: int, rows: int, width: int) -> Tile:
    """Choose a tile by size alone, so that nothing is tuned at run time and the same shapes give the same bits.

    Large blocks read less, small ones leave no part of the GPU idle.
    """
    block_m, block_n, *_ = _BLOCKS["large"]
    return "large" if batch * cdiv(rows, block_m) * cdiv(width, block_n) >= _MANY_PROGRAMS else "small"


def splits_for(num_chunks: int, weight_blocks: int) -> tuple[int, int]:
    """Return into how many parts a sum over chunks is split, and how many chunks each has, by size alone.

    There are no more parts than run at once, since a few programs more would take as long as all others again.
    """
    chunks_a_split = cdiv(num_chunks, min(_MAX_SPLITS, max(1, _MANY_PROGRAMS // weight_blocks)))
    return cdiv(num_chunks, chunks_a_split), chunks_a_split


def elementwise_grid(rows: int, columns: int) -> tuple[int, int]:
    blocks = dict(BLOCKS_ELEMENTWISE)
    return cdiv(rows, blocks["BLOCK_M"]), cdiv(columns, blocks["BLOCK_N"])


def round_up(size: int) -> int:
    return cdiv(size, PADDING) * PADDING
