"""All that is independent of visual tokens, in one launch: keys, values, and two large weights in the tokens' dtype.

Keys and values are ``LN(t) W_k^T`` and ``LN(t) W_v^T + b_v`` of the instruction tokens. Weights are read as they are
stored and rounded on the chip. W_q and W_o are the exception: every block of visual tokens reads them again, so
programs of the same launch write them once in the dtype in which they are multiplied. Nothing is kept from one call to
the next: a weight that was assigned through ``.data`` has no new version, and a copy of it would be stale unnoticed.

Sizes: R instructions of T tokens of width E; I inner width, D width of the visual tokens.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"
# ruff: noqa: E741, N803 (sizes are upper-case in Triton code)

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...errors import ShapeError
from ..launch import DTYPES, Configuration, aligned, cdiv, dot, refuse_forward_mode, rounded
from .layout import mask_bytes
from .tiles import BLOCKS, configuration, row_statistics, weight_tile


@triton.jit(do_not_specialize=["M", "masked", "numbers"], do_not_specialize_on_alignment=["key_mask_ptr"])
def instruction_forward(
    token_ptr,  # [M, E]
    key_mask_ptr,  # uint8 [M]; not read unless masked
    norm_weight_ptr,  # [E]
    norm_bias_ptr,  # [E]
    key_weight_ptr,  # [I, E]
    value_weight_ptr,  # [I, E]
    value_bias_ptr,  # [I]
    query_weight_ptr,  # float32, any shape of as many numbers
    output_weight_ptr,  # float32, the same
    key_ptr,  # out [M, I]; 0 where masked
    value_ptr,  # out [M, I]; 0 where masked
    cast_ptr,  # out [2, numbers]: W_q and W_o
    M,
    E,
    I,
    masked,
    numbers,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
    BLOCK_CAST: tl.constexpr,
):
    """Make keys and values, and cast W_q and W_o.

    One program for BLOCK_M instruction tokens and BLOCK_KEY columns; further ones cast BLOCK_CAST numbers each.
    """
    inner_blocks = tl.cdiv(I, BLOCK_KEY)
    projections = tl.cdiv(M, BLOCK_M) * inner_blocks
    if tl.program_id(0) >= projections:
        places = (tl.program_id(0) - projections) * BLOCK_CAST + tl.arange(0, BLOCK_CAST)
        query_weight = tl.load(query_weight_ptr + places, mask=places < numbers, other=0.0)
        second = (places >= numbers) & (places < 2 * numbers)
        output_weight = tl.load(output_weight_ptr + (places - numbers), mask=second, other=0.0)
        weight = tl.where(places < numbers, query_weight, output_weight)
        tl.store(cast_ptr + places, rounded(weight, cast_ptr.dtype.element_ty), mask=places < 2 * numbers)
        return
    rows = tl.program_id(0) // inner_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    first_inner = tl.program_id(0) % inner_blocks * BLOCK_KEY
    inner = first_inner + tl.arange(0, BLOCK_KEY)
    row_inside = rows < M
    valid = row_inside
    if masked != 0:
        # Padding is not read: it may hold anything.
        valid = tl.load(key_mask_ptr + rows, mask=row_inside, other=0) != 0
    tokens = token_ptr + rows.to(tl.int64) * E
    reference, center, rstd = row_statistics(tokens, valid, E, eps, BLOCK_M, BLOCK_D)
    key = tl.zeros([BLOCK_M, BLOCK_KEY], tl.float32)
    value = tl.zeros([BLOCK_M, BLOCK_KEY], tl.float32)
    for first in range(0, E, BLOCK_D):
        channels = first + tl.arange(0, BLOCK_D)
        inside = channels < E
        token = tl.load(tokens[:, None] + channels[None, :], mask=valid[:, None] & inside[None, :], other=0.0)
        norm_weight = tl.load(norm_weight_ptr + channels, mask=inside, other=0.0).to(tl.float32)
        norm_bias = tl.load(norm_bias_ptr + channels, mask=inside, other=0.0).to(tl.float32)
        normed = (token.to(tl.float32) - reference[:, None] - center[:, None]) * rstd[:, None]
        normed = rounded(normed * norm_weight[None, :] + norm_bias[None, :], token_ptr.dtype.element_ty)
        key_weight = weight_tile(key_weight_ptr, inner, first, I, E, BLOCK_D).to(tl.float32)
        key = dot(normed, tl.trans(rounded(key_weight, token_ptr.dtype.element_ty)), key)
        value_weight = weight_tile(value_weight_ptr, inner, first, I, E, BLOCK_D).to(tl.float32)
        value = dot(normed, tl.trans(rounded(value_weight, token_ptr.dtype.element_ty)), value)
    value += tl.load(value_bias_ptr + inner, mask=inner < I, other=0.0).to(tl.float32)[None, :]
    places = rows.to(tl.int64)[:, None] * I + inner[None, :]
    inside = row_inside[:, None] & (inner < I)[None, :]
    tl.store(key_ptr + places, rounded(tl.where(valid[:, None], key, 0.0), key_ptr.dtype.element_ty), mask=inside)
    tl.store(value_ptr + places, rounded(tl.where(valid[:, None], value, 0.0), value_ptr.dtype.element_ty), mask=inside)


# --- operators -------------------------------------------------------------------------------------------------


@torch.library.custom_op("emma_adapter::keys_and_values", mutates_args=())
def _instruction(
    tokens: Tensor,
    mask: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    query_weight: Tensor,
    output_weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return keys and values ``[R, T, I]``; W_q and W_o in the tokens' dtype ``[2, I D]``, empty if they have it."""
    key, value, cast = outputs = _empty_outputs(tokens, key_weight, query_weight, output_weight)
    dtype = tokens.dtype
    weights = (norm_weight, norm_bias, key_weight, value_weight, value_bias)
    weight_dtype = dtype if all(weight.dtype == dtype for weight in weights) else torch.float32
    norm_weight, norm_bias, key_weight, value_weight, value_bias = (aligned(weight, weight_dtype) for weight in weights)
    if cast.numel():
        to_cast = aligned(query_weight, torch.float32), aligned(output_weight, torch.float32)
    else:
        to_cast = (tokens.new_empty(1, dtype=torch.float32),) * 2  # Not read.
    block = BLOCKS[dtype]
    (rows, length, width), inner = tokens.shape, len(key_weight)
    projections = cdiv(rows * length, block["BLOCK_M"]) * cdiv(inner, block["BLOCK_KEY"])
    configuration(instruction_forward, dtype, weights=weight_dtype).launch(
        (projections + cdiv(cast.numel(), block["BLOCK_CAST"]),),
        tokens.device,
        token_ptr=aligned(tokens),
        key_mask_ptr=key.view(torch.uint8) if mask is None else mask_bytes(mask),
        norm_weight_ptr=norm_weight,
        norm_bias_ptr=norm_bias,
        key_weight_ptr=key_weight,
        value_weight_ptr=value_weight,
        value_bias_ptr=value_bias,
        query_weight_ptr=to_cast[0],
        output_weight_ptr=to_cast[1],
        key_ptr=key,
        value_ptr=value,
        cast_ptr=cast if cast.numel() else key,
        M=rows * length,
        E=width,
        I=inner,
        masked=int(mask is not None),
        numbers=cast.numel() // 2,
        eps=eps,
    )
    return outputs


def _empty_outputs(
    tokens: Tensor, key_weight: Tensor, query_weight: Tensor, output_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    key = tokens.new_empty(*tokens.shape[:2], key_weight.shape[0])
    # In other dtypes than float32 they are cast where they are used.
    casts = tokens.dtype != torch.float32 and query_weight.dtype == output_weight.dtype == torch.float32
    return key, torch.empty_like(key), tokens.new_empty(*((2, query_weight.numel()) if casts else (0,)))


@_instruction.register_fake
def _(
    tokens: Tensor,
    mask: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    query_weight: Tensor,
    output_weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_outputs(tokens, key_weight, query_weight, output_weight)


@torch.library.custom_op("emma_adapter::keys_and_values_backward", mutates_args=())
def _instruction_backward(
    key_grad: Tensor,
    value_grad: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    eps: float,
    need_tokens: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of the tokens, W_k and W_v, in the tokens' dtype; of scale, shift and b_v, in float32.

    That of the tokens is empty unless ``need_tokens``. Scale and shift are those of the norm. Computed by PyTorch's own
    operations, since the instruction is short.
    """
    dtype, width = tokens.dtype, tokens.shape[-1:]
    scale, shift = norm_weight.float(), norm_bias.float()
    wide = (tokens if mask is None else tokens.masked_fill(~mask[..., None], 0)).float()
    normed, mean, rstd = torch.native_layer_norm(wide, width, scale, shift, eps)
    key_rows, value_rows, rows = (x.reshape(-1, x.shape[-1]) for x in (key_grad, value_grad, normed.to(dtype)))
    # As in the kernels, autocast around the call changes nothing.
    with torch.autocast(tokens.device.type, enabled=False):
        grad = torch.addmm(key_rows @ key_weight.to(dtype), value_rows, value_weight.to(dtype)).view(tokens.shape)
        weight_grads = key_rows.mT @ rows, value_rows.mT @ rows
    token_grad, *norm_grads = torch.ops.aten.native_layer_norm_backward(
        grad.float(), wide, width, mean, rstd, scale, shift, [need_tokens, True, True]
    )
    if not need_tokens:
        token_grad = tokens.new_empty(0)
    elif mask is not None:
        token_grad = token_grad.masked_fill(~mask[..., None], 0)
    return token_grad.to(dtype), *weight_grads, *norm_grads, value_rows.sum(0, dtype=torch.float32)


@_instruction_backward.register_fake
def _(
    key_grad: Tensor,
    value_grad: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    eps: float,
    need_tokens: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    token_grad = torch.empty_like(tokens, memory_format=torch.contiguous_format) if need_tokens else tokens.new_empty(0)
    key, value = tokens.new_empty(key_weight.shape), tokens.new_empty(value_weight.shape)
    shapes = (norm_weight.shape, norm_bias.shape, value_weight.shape[:1])
    scale, shift, bias = (tokens.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return token_grad, key, value, scale, shift, bias


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tokens, mask, norm_weight, norm_bias, key_weight, value_weight, value_bias, _query, _output, eps = inputs
    ctx.save_for_backward(tokens, mask, norm_weight, norm_bias, key_weight, value_weight)
    ctx.bias_dtype, ctx.eps, ctx.shape = value_bias.dtype, eps, output[0].shape
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, key_grad: Tensor | None, value_grad: Tensor | None, _cast: Tensor | None
) -> tuple[Tensor | None, ...]:
    tokens, mask, *weights = ctx.saved_tensors
    key_grad, value_grad = (tokens.new_zeros(ctx.shape) if grad is None else grad for grad in (key_grad, value_grad))
    token_grad, key_weight_grad, value_weight_grad, scale_grad, shift_grad, bias_grad = _instruction_backward(
        key_grad, value_grad, tokens, mask, *weights, ctx.eps, ctx.needs_input_grad[0]
    )
    weight_grads = (scale_grad, shift_grad, key_weight_grad, value_weight_grad, bias_grad)
    dtypes = (*(weight.dtype for weight in weights), ctx.bias_dtype)
    grads = (token_grad, None, *(grad.to(dtype) for grad, dtype in zip(weight_grads, dtypes, strict=True)))
    needed = ctx.needs_input_grad[: len(grads)]
    return *(grad if need else None for grad, need in zip(grads, needed, strict=True)), None, None, None


_instruction.register_autograd(_backward, setup_context=_save_for_backward)


# --- public ----------------------------------------------------------------------------------------------------


def keys_and_values(
    tokens: Tensor,
    mask: Tensor | None,
    *,
    norm_weight: Tensor,
    norm_bias: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    query_weight: Tensor,
    output_weight: Tensor,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return ``LN(t) W_k^T`` and ``LN(t) W_v^T + b_v``; also W_q and W_o as :func:`cross_attention` multiplies them.

    Differentiable once in the tokens and the weights of keys and values.

    Args:
        tokens: instruction tokens ``[R, T, E]``, float32, float16 or bfloat16, on a device that has the kernels.
        mask: bool ``[R, T]``, true at valid tokens; None if all are. The others are not read.
        norm_weight: ``[E]``. All weights may have any floating dtype; gradients have the same.
        norm_bias: ``[E]``.
        key_weight: ``[I, E]``.
        value_weight: ``[I, E]``.
        value_bias: ``[I]``.
        query_weight: ``[I, D]``.
        output_weight: ``[D, I]``.
        eps: of the LayerNorm.

    Returns:
        Keys and values ``[R, T, I]``, 0 at masked tokens; and, for the ``cast_weights`` of :func:`cross_attention`, a
        copy of W_q and W_o if they are float32 and the tokens are not, else None.

    Raises:
        KernelError: if a tensor has a forward-mode tangent.
        ShapeError: if tensors don't fit each other.
    """
    refuse_forward_mode(tokens, norm_weight, norm_bias, key_weight, value_weight, value_bias)
    (*rows, width), inner = tokens.shape, key_weight.shape[0]
    for name, tensor, shape in (
        ("mask", mask, (*rows,)),
        ("norm_weight", norm_weight, (width,)),
        ("norm_bias", norm_bias, (width,)),
        ("key_weight", key_weight, (inner, width)),
        ("value_weight", value_weight, (inner, width)),
        ("value_bias", value_bias, (inner,)),
        ("output_weight", output_weight, query_weight.shape[::-1]),
    ):
        if tensor is not None and tensor.shape != shape:
            raise ShapeError(f"{name} must be {list(shape)}; got {list(tensor.shape)}")
    key, value, cast = _instruction(
        *(tokens, mask, norm_weight, norm_bias, key_weight, value_weight, value_bias),
        *(query_weight.detach(), output_weight.detach(), eps),
    )
    return key, value, cast.detach() if cast.numel() else None


def configurations() -> Iterator[Configuration]:
    for dtype in DTYPES:
        for weights in dict.fromkeys((torch.float32, dtype)):
            yield configuration(instruction_forward, dtype, weights=weights)
