"""Shared by forward and backward of cross-attention: tiles, and the one table of their sizes."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"
# ruff: noqa: E741, N803 (sizes are upper-case in Triton code)

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl

from ..launch import Configuration, dot

LOG2_E = tl.constexpr(math.log2(math.e))
#: Bytes of the keys' mask that are read together; most instructions are no longer.
MASK_BLOCK = tl.constexpr(128)

# --- the sizes of tiles ----------------------------------------------------------------------------------------

_SHARED = {"CHUNK": 512, "BLOCK_SUM": 512, "BLOCK_CAST": 2048}
#: Tokens (M), channels (D), inner width (I) and instruction tokens (T) of a tile. Instructions are short, and a loop
#: over blocks of 32 computes less padding than one tile for the longest. float32 has no tensor cores: small tiles.
#: Gradients of keys and values are first summed over CHUNK tokens, then over chunks, BLOCK_SUM numbers in a program.
#: Keys and values are made BLOCK_KEY columns of both at once; BLOCK_CAST numbers are cast in a program.
BLOCKS: dict[torch.dtype, dict[str, int]] = {
    torch.bfloat16: {"BLOCK_M": 64, "BLOCK_D": 64, "BLOCK_I": 128, "BLOCK_T": 32, "BLOCK_KEY": 32, **_SHARED},
    torch.float16: {"BLOCK_M": 64, "BLOCK_D": 64, "BLOCK_I": 128, "BLOCK_T": 32, "BLOCK_KEY": 32, **_SHARED},
    torch.float32: {"BLOCK_M": 32, "BLOCK_D": 32, "BLOCK_I": 64, "BLOCK_T": 32, "BLOCK_KEY": 32, **_SHARED},
}
#: Programs that keep a GPU of 132 to 304 multiprocessors busy.
MANY_PROGRAMS = 264
#: The width of a head's tile: that of the head, rounded up.
HEAD_BLOCKS = (32, 64)
#: num_warps and num_stages, chosen so that no variant spills registers on the targets of the tests.
SCHEDULES = {
    "instruction_forward": (4, 2),
    "query_forward": (4, 2),
    "attention_forward": (4, 1),
    "output_forward": (4, 2),
    "output_backward": (8, 2),
    "query_backward": (4, 1),
    "key_value_backward": (4, 1),
    "key_value_sum": (4, 2),
    "query_weight_backward": (4, 2),
    "output_weight_backward": (8, 2),
    "position_backward": (4, 2),
    "visual_backward": (8, 1),
}
#: Variants with another schedule: by kernel, whether their tiles are those of float32, and their other constants.
EXCEPTIONS: tuple[tuple[str, bool, dict[str, int], tuple[int, int]], ...] = (
    ("attention_forward", True, {}, (4, 2)),
    ("output_forward", False, {"ONE_TILE": False}, (8, 2)),
    ("output_backward", False, {"MODULATE": True}, (8, 1)),
    ("query_backward", False, {"BLOCK_H": 64}, (4, 2)),
    ("query_backward", True, {"BLOCK_H": 32}, (2, 1)),
    ("output_weight_backward", False, {"MODULATE": True, "ONE_TILE": True}, (4, 2)),
    ("output_weight_backward", False, {"MODULATE": True, "ONE_TILE": False}, (8, 1)),
)
#: Kernels that ask for ONE_TILE only to compute a gate.
READ_TILES_IN_GATE = ("output_backward", "output_weight_backward")

_FLOAT32 = {
    *("norm_weight_ptr", "norm_bias_ptr", "bias_ptr", "position_ptr", "center_ptr", "rstd_ptr", "lse_ptr", "delta_ptr"),
    *("key_partial_ptr", "value_partial_ptr", "weight_partial_ptr", "bias_partial_ptr", "position_grad_ptr"),
}
_INT32 = {"position_start_ptr", "cu_seqlens_ptr", "instruction_ptr"}
_TYPES = {
    **dict.fromkeys(_FLOAT32, torch.float32),
    **dict.fromkeys(_INT32, torch.int32),
    "key_mask_ptr": torch.uint8,
}
#: Parameters of ``instruction_forward`` that it reads as they are stored: in float32 or in the tokens' dtype.
_AS_STORED = ("norm_weight_ptr", "norm_bias_ptr", "key_weight_ptr", "value_weight_ptr", "value_bias_ptr")
_TO_CAST = dict.fromkeys(("query_weight_ptr", "output_weight_ptr"), torch.float32)


@cache
def configuration(
    kernel: Any, dtype: torch.dtype, *, weights: torch.dtype | None = None, **variant: int
) -> Configuration:
    """Return the variant of a kernel for tokens of a dtype.

    ``weights`` is the dtype in which it reads weights as they are stored, if it does; ``variant`` are ``BLOCK_H``,
    ``MODULATE`` and ``ONE_TILE`` where it has them.
    """
    names = kernel.arg_names
    types = _TYPES if weights is None else {**_TYPES, **_TO_CAST, **dict.fromkeys(_AS_STORED, weights)}
    constants = {**BLOCKS[dtype], **variant}
    name = kernel.fn.__name__
    num_warps, num_stages = SCHEDULES[name]
    for exception, is_float32, others, schedule in EXCEPTIONS:
        if (exception, is_float32) == (name, dtype == torch.float32) and others.items() <= variant.items():
            num_warps, num_stages = schedule
    return Configuration(
        kernel,
        dtype,
        types=tuple((parameter, types[parameter]) for parameter in names if parameter in types),
        constants=tuple((parameter, constants[parameter]) for parameter in names if parameter in constants),
        num_warps=num_warps,
        num_stages=num_stages,
    )


def variants(kernel: Any) -> Iterator[Configuration]:
    """Yield every variant of a kernel that can be dispatched."""
    names = kernel.arg_names
    choices = {"BLOCK_H": HEAD_BLOCKS, "MODULATE": (False, True), "ONE_TILE": (True, False)}
    choices = {name: values for name, values in choices.items() if name in names}
    for dtype, values in product(BLOCKS, product(*choices.values())):
        variant = dict(zip(choices, values, strict=True))
        if kernel.fn.__name__ in READ_TILES_IN_GATE and variant["ONE_TILE"] and not variant["MODULATE"]:
            continue
        yield configuration(kernel, dtype, **variant)


def head_block(head_dim: int) -> int:
    return next(block for block in HEAD_BLOCKS if head_dim <= block)


# --- device functions ------------------------------------------------------------------------------------------


@triton.jit
def segment_slice(slot, cu_seqlens_ptr, N, num_segments, search_steps, BLOCK: tl.constexpr):
    """Return the segment and its rows ``[start, stop)`` on which the program with the number ``slot`` works.

    If all segments have N tokens, each is cut at multiples of BLOCK from its own start: ``S cdiv(N, BLOCK)`` programs.
    If N is 0, rows are cut at the ends of segments and at multiples of BLOCK. On the way through the pieces either the
    segment or the block grows by one, so that ``segment + block`` numbers the pieces without gaps that the host would
    have to know: ``cdiv(M, BLOCK) + S`` programs suffice. Some get no rows.
    """
    if N > 0:
        blocks = tl.cdiv(N, BLOCK)
        segment = slot // blocks
        start = segment * N + slot % blocks * BLOCK
        stop = tl.minimum(start + BLOCK, segment * N + N)
    else:
        segment = slot * 0
        high = segment + num_segments
        for _ in range(search_steps):
            middle = (segment + high) // 2
            reached = tl.load(cu_seqlens_ptr + middle) // BLOCK + middle <= slot
            segment = tl.where(reached, middle, segment)
            high = tl.where(reached, high, middle)
        block = slot - segment
        start = tl.maximum(block * BLOCK, tl.load(cu_seqlens_ptr + segment))
        stop = tl.minimum(block * BLOCK + BLOCK, tl.load(cu_seqlens_ptr + segment + 1))
    return segment, start, stop


@triton.jit
def instruction_row(segment, instruction_ptr, shared):
    """Return the row of a segment's keys: the one in ``instruction_ptr``, or, if not ``shared``, the segment's own."""
    row = segment
    if shared != 0:
        row = tl.load(instruction_ptr + segment)
    return row


@triton.jit
def number_of_keys(key_mask_ptr, first_key, T):
    """Return how many keys have to be read: those up to the last valid one."""
    keys = T * 0
    for first in range(0, T, MASK_BLOCK):
        t = first + tl.arange(0, MASK_BLOCK)
        valid = tl.load(key_mask_ptr + first_key + t, mask=t < T, other=0) != 0
        keys = tl.maximum(keys, tl.max(tl.where(valid, t + 1, 0), 0))
    return keys


@triton.jit
def row_statistics(x_rows, row_inside, D, eps, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return the statistics for LayerNorm of rows of width D at the pointers ``x_rows [BLOCK_M]``.

    They are the mean in two parts, reference and center, and the reciprocal of the standard deviation.
    """
    # Mean and variance, block by block (Chan et al. 1983), of the difference to one of the token's own entries: where
    # the mean is much larger than the deviation, float32 can't hold both the mean and what remains without it. The
    # smallest entry is no outlier, and as good as any other beside a large mean.
    channels = tl.arange(0, BLOCK_D)
    inside = row_inside[:, None] & (channels < D)[None, :]
    x = tl.load(x_rows[:, None] + channels[None, :], mask=inside, other=0.0).to(tl.float32)
    size = tl.where(inside, tl.abs(x), float("inf"))
    is_smallest = size == tl.min(size, 1)[:, None]
    reference = tl.sum(tl.where(is_smallest, x, 0.0), 1) / tl.sum(tl.where(is_smallest, 1.0, 0.0), 1)
    center = tl.zeros([BLOCK_M], tl.float32)
    squares = tl.zeros([BLOCK_M], tl.float32)
    seen = 0.0
    for first in range(0, D, BLOCK_D):
        channels = first + tl.arange(0, BLOCK_D)
        inside = row_inside[:, None] & (channels < D)[None, :]
        x = tl.load(x_rows[:, None] + channels[None, :], mask=inside, other=0.0).to(tl.float32)
        x = tl.where(inside, x - reference[:, None], 0.0)
        width = tl.sum(tl.where(channels < D, 1.0, 0.0), 0)
        block_mean = tl.sum(x, 1) / width
        deviation = tl.where(inside, x - block_mean[:, None], 0.0)
        step = block_mean - center
        squares += tl.sum(deviation * deviation, 1) + step * step * (seen * width / (seen + width))
        center += step * (width / (seen + width))
        seen += width
    return reference, center, tl.rsqrt(squares / D + eps)


@triton.jit
def attended_tile(attended_ptr, rows, row_inside, first, I, BLOCK_I: tl.constexpr):
    """Load o at rows, from the column ``first`` on, ``[rows, BLOCK_I]``."""
    inner = first + tl.arange(0, BLOCK_I)
    return tl.load(
        attended_ptr + rows.to(tl.int64)[:, None] * I + inner[None, :],
        mask=row_inside[:, None] & (inner < I)[None, :],
        other=0.0,
    )


@triton.jit
def weight_tile(weight_ptr, channels, first, D, I, BLOCK_I: tl.constexpr):
    """Load W_o at channels, from the column ``first`` on, ``[channels, BLOCK_I]``."""
    inner = first + tl.arange(0, BLOCK_I)
    return tl.load(
        weight_ptr + channels[:, None] * I + inner[None, :],
        mask=(channels < D)[:, None] & (inner < I)[None, :],
        other=0.0,
    )


@triton.jit
def output_tile(
    attended_ptr,  # [M, I]
    weight_ptr,  # [D, I]
    bias_ptr,  # [D]
    rows,
    row_inside,
    columns,
    D,
    I,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Compute the update ``z = o W_o^T + b_o`` at rows and columns, float32 ``[BLOCK_M, BLOCK_D]``."""
    z = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(0, I, BLOCK_I):
        attended = attended_tile(attended_ptr, rows, row_inside, first, I, BLOCK_I)
        weight = weight_tile(weight_ptr, columns, first, D, I, BLOCK_I)
        z = dot(attended, tl.trans(weight), z)
    return z + tl.load(bias_ptr + columns, mask=columns < D, other=0.0)[None, :]


@triton.jit
def is_finite_token(rstd):
    """Return False for tokens that hold NaN or Inf: their standard deviation is NaN."""
    return rstd == rstd  # noqa: PLR0124


@triton.jit
def updated_rows(lse_ptr, rstd_ptr, rows, row_inside, num_heads):
    """Return which rows are finite tokens whose instruction has a key; the others are passed on untouched."""
    lse = tl.load(lse_ptr + rows.to(tl.int64) * num_heads, mask=row_inside, other=float("-inf"))
    rstd = tl.load(rstd_ptr + rows, mask=row_inside, other=0.0)
    return row_inside & (lse != float("-inf")) & is_finite_token(rstd)
