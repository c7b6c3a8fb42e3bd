"""The cross-modal step of ``attention`` and ``modulation``: cross-attention and its residual.

Keys and values come from :func:`~.instruction.keys_and_values`. Then three kernels, each of which passes once over the
visual tokens or over tensors of the inner width (``forward.py``):

1. ``query_forward``: LayerNorm, query projection and positions; the normalised tokens stay on the chip.
2. ``attention_forward``: softmax over the few instruction tokens, for one head and one block of a segment's tokens.
3. ``output_forward``: output projection and residual; the update stays on the chip.

Backward (``gradients.py``) needs the visual tokens and what 1 and 2 wrote, which is of the inner width.

Sizes: M visual tokens of width D in S segments, R instructions of T tokens, H heads, I inner width, P positions.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import ConfigError, KernelError, ShapeError
from ..launch import refuse_forward_mode, visual_tokens_problem
from . import forward
from .gradients import cross_attention_backward
from .tiles import BLOCKS, HEAD_BLOCKS

Epilogue = Literal["add", "modulate"]


def cross_attention_reference(
    visual_tokens: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None = None,
    *,
    num_heads: int,
    norm_weight: Tensor,
    norm_bias: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    output_weight: Tensor,
    output_bias: Tensor,
    position: Tensor | None = None,
    position_start: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    instruction_rows: Tensor | None = None,
    eps: float = 1e-5,
    epilogue: Epilogue = "add",
) -> Tensor:
    """Compute :func:`cross_attention`, one segment after another, in any dtype and on any device."""
    if cu_seqlens is None:
        segments = list(visual_tokens.unbind(0))
    else:
        segments = list(visual_tokens.split(cu_seqlens.diff().tolist()))
    outputs = []
    for index, x in enumerate(segments):
        row = index if instruction_rows is None else int(instruction_rows[index])
        valid = torch.ones_like(key[row, :, 0], dtype=torch.bool) if key_mask is None else key_mask[row].bool()
        if not valid.any():
            outputs.append(x)
            continue
        query = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps) @ query_weight.T + query_bias
        if position is not None:
            start = 0 if position_start is None else int(position_start[index])
            query = query + position[start : start + len(x)]
        queries, keys, values = (
            tokens.unflatten(-1, (num_heads, -1)).movedim(-2, 0)
            for tokens in (query, key[row, valid], value[row, valid])
        )
        weights = torch.softmax(queries @ keys.mT / math.sqrt(queries.shape[-1]), dim=-1)
        update = (weights @ values).movedim(0, -2).flatten(-2) @ output_weight.T + output_bias
        outputs.append(x + update if epilogue == "add" else x * 2 * torch.sigmoid(update))
    if cu_seqlens is None:
        return torch.stack(outputs) if outputs else visual_tokens.clone()
    return torch.cat([visual_tokens[:0], *outputs])


@torch.library.custom_op("emma_adapter::cross_attention", mutates_args=())
def _cross_attention(
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
    segments: int,
    num_heads: int,
    eps: float,
    modulate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return y and, for backward, query, attended ``[M, I]``, lse ``[M, H]``, center ``[M, 2]`` and rstd ``[M]``."""
    outputs = _empty_outputs(x, query_weight, num_heads)
    if len(x):
        forward.attend(
            *(x, key, value, key_mask, instruction, cu_seqlens, norm_weight, norm_bias, query_weight, query_bias),
            *(position, position_start, output_weight, output_bias, cast_weights),
            segments=segments,
            num_heads=num_heads,
            eps=eps,
            modulate=modulate,
            outputs=outputs,
        )
    return outputs


def _empty_outputs(
    x: Tensor, query_weight: Tensor, num_heads: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens, inner = x.shape[0], query_weight.shape[0]
    statistic: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
    return (
        x.new_empty(x.shape),
        x.new_empty(tokens, inner),
        x.new_empty(tokens, inner),
        torch.empty(tokens, num_heads, **statistic),
        torch.empty(tokens, 2, **statistic),
        torch.empty(tokens, **statistic),
    )


@_cross_attention.register_fake
def _(
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
    segments: int,
    num_heads: int,
    eps: float,
    modulate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _empty_outputs(x, query_weight, num_heads)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, segments, num_heads, _eps, modulate = inputs
    del tensors[9]  # no gradient needs the bias of the query
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.segments, ctx.num_heads, ctx.modulate = segments, num_heads, modulate
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_intermediates: Tensor | None) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad
    if grad is None:
        return (None,) * len(needed)
    weights = needed[6:14]
    options = (ctx.segments, ctx.num_heads, ctx.modulate)
    computed = cross_attention_backward(
        grad, *ctx.saved_tensors, *options, needed[0], needed[1] or needed[2], any(weights)
    )
    x, key, value, norm_weight, norm_bias, query_weight, query_bias, position, output_weight, output_bias = computed
    gradients = (
        *(x, key, value, None, None, None),
        *(norm_weight, norm_bias, query_weight, query_bias, position, None, output_weight, output_bias),
        *(None, None, None, None, None),
    )
    return tuple(gradient if need else None for gradient, need in zip(gradients, needed, strict=True))


_cross_attention.register_autograd(_backward, setup_context=_save_for_backward)


def cross_attention(  # noqa: PLR0912 (it is checks)
    visual_tokens: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None = None,
    *,
    num_heads: int,
    norm_weight: Tensor,
    norm_bias: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    output_weight: Tensor,
    output_bias: Tensor,
    position: Tensor | None = None,
    position_start: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    instruction_rows: Tensor | None = None,
    cast_weights: Tensor | None = None,
    eps: float = 1e-5,
    epilogue: Epilogue = "add",
) -> Tensor:
    """Return ``x + z`` or ``x 2 sigmoid(z)``, with z the result of cross-attention to an instruction.

    ``z = softmax((LN(x) W_q^T + b_q + pos) K^T / sqrt(d) + mask) V W_o^T + b_o``.
    Computed in the dtype of the visual tokens, with sums in float32; deterministic, backward included. Where z is 0, in
    segments whose instruction has no valid key, and for tokens that hold NaN or Inf, the result is x bit for bit.

    Args:
        visual_tokens: x, ``[S, N, D]``; or, with ``cu_seqlens``, all segments one after another ``[M, D]``.
        key: ``[R, T, I]``, projected; heads lie one after another in I.
        value: ``[R, T, I]``, projected.
        key_mask: ``[R, T]``, true at valid keys; None if all are. Keys and values elsewhere are not read.
        num_heads: the width of a head is ``I / num_heads``.
        norm_weight: ``[D]``. All weights may have any floating dtype; gradients have the same.
        norm_bias: ``[D]``.
        query_weight: ``[I, D]``.
        query_bias: ``[I]``.
        output_weight: ``[D, I]``.
        output_bias: ``[D]``.
        position: the query terms of positions ``[P, I]``, or none. Token i of segment s gets row
            ``position_start[s] + i``: tables for several grids are laid one after another.
        position_start: integers ``[S]``; None if all segments start at row 0.
        cu_seqlens: integers ``[S + 1]`` on the device of x, from 0 to M: segment s is rows ``cu_seqlens[s]`` to
            ``cu_seqlens[s + 1]``, and may be empty. Their values are not checked: that would wait for the GPU.
        instruction_rows: integers ``[S]``, the row of key and value for each segment; None if segment s meets row s.
        cast_weights: ``query_weight`` and ``output_weight`` in the dtype of x, ``[2, I D]``, if there is such a copy;
            None to make one. Their gradients are those of the weights.
        eps: of the LayerNorm.
        epilogue: ``"add"`` or ``"modulate"``.

    Returns:
        A tensor like ``visual_tokens``.

    Raises:
        KernelError: with :func:`unsupported_reason`, if there is one.
        ShapeError: if tensors don't fit each other.
    """
    if epilogue not in ("add", "modulate"):
        raise ConfigError(f'epilogue must be "add" or "modulate"; got {epilogue!r}')
    refuse_forward_mode(visual_tokens, key, value, query_weight, output_weight)
    if visual_tokens.ndim != (3 if cu_seqlens is None else 2):
        raise ShapeError(f"visual_tokens must be [S, N, D], or [M, D] with cu_seqlens; got {list(visual_tokens.shape)}")
    if key.ndim != 3 or key.shape[1] < 1:
        raise ShapeError(f"keys must be [R, T, I] with at least one key; got {list(key.shape)}")
    if reason := unsupported_reason(visual_tokens, key.shape[2], num_heads):
        raise KernelError(reason)
    width, inner, tokens = visual_tokens.shape[-1], key.shape[-1], visual_tokens.shape[-2]
    segments = visual_tokens.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if segments < 1 and visual_tokens.numel():
        raise ShapeError("visual tokens need at least one segment")
    if instruction_rows is None and segments != key.shape[0]:
        raise ShapeError(f"{segments} segments and {key.shape[0]} instructions need instruction_rows")
    if position is not None and cu_seqlens is None and position_start is None and position.shape[0] != tokens:
        raise ShapeError(f"{tokens} visual tokens a segment need as many positions; got {position.shape[0]}")
    for name, tensor, shape in (
        ("value", value, key.shape),
        ("key_mask", key_mask, key.shape[:2]),
        ("norm_weight", norm_weight, (width,)),
        ("norm_bias", norm_bias, (width,)),
        ("query_weight", query_weight, (inner, width)),
        ("query_bias", query_bias, (inner,)),
        ("output_weight", output_weight, (width, inner)),
        ("output_bias", output_bias, (width,)),
        ("position", position, (None if position is None else position.shape[0], inner)),
        ("position_start", position_start, (segments,)),
        ("instruction_rows", instruction_rows, (segments,)),
        ("cast_weights", cast_weights, (2, inner * width)),
    ):
        if tensor is not None and tensor.shape != shape:
            raise ShapeError(f"{name} must be {list(shape)}; got {list(tensor.shape)}")

    if cast_weights is not None and cast_weights.dtype != visual_tokens.dtype:
        raise ShapeError(f"cast_weights must have the dtype of visual_tokens; got {cast_weights.dtype}")
    x = visual_tokens.reshape(-1, width).contiguous()
    if position_start is not None and cu_seqlens is None:
        cu_seqlens = torch.arange(segments + 1, device=x.device) * tokens
    elif position_start is None and cu_seqlens is not None and position is not None:
        position_start = cu_seqlens.new_zeros(segments)
    if instruction_rows is not None:
        # Indexing reports rows that don't exist, on a GPU too; a kernel would read whatever lies there.
        instruction_rows = torch.arange(key.shape[0], device=x.device)[instruction_rows.to(x.device)]
    instruction_rows, cu_seqlens, position_start = (
        _integers(tensor, x.device) for tensor in (instruction_rows, cu_seqlens, position_start)
    )
    if key_mask is None:
        key_mask = torch.ones(key.shape[:2], dtype=torch.bool, device=x.device)
    y, *_ = _cross_attention(
        x,
        key.to(x.dtype),
        value.to(x.dtype),
        key_mask,
        instruction_rows,
        cu_seqlens,
        norm_weight,
        norm_bias,
        query_weight,
        query_bias,
        position,
        position_start,
        output_weight,
        output_bias,
        cast_weights,
        segments,
        num_heads,
        eps,
        epilogue == "modulate",
    )
    return y.view(visual_tokens.shape)


def _integers(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device, torch.int32).contiguous()


def unsupported_reason(visual_tokens: Tensor, inner_dim: int, num_heads: int) -> str | None:
    """Return why :func:`cross_attention` can't take tokens ``[..., D]`` and keys ``[R, T, inner_dim]``, or None."""
    if problem := visual_tokens_problem(visual_tokens):
        return problem
    head_dim = inner_dim // num_heads if num_heads > 0 else 0
    heads_fit = inner_dim == num_heads * head_dim and 16 <= head_dim <= max(HEAD_BLOCKS)
    if not heads_fit or inner_dim % 16 or inner_dim > 512:
        return (
            f"the inner width must be a multiple of 16 and at most 512, in heads of 16 to {max(HEAD_BLOCKS)}; "
            f"got {inner_dim} for {num_heads} heads"
        )
    if visual_tokens.numel() // visual_tokens.shape[-1] >= 2**31 - BLOCKS[visual_tokens.dtype]["BLOCK_M"]:
        return "more than 2^31 visual tokens in one call"
    return None
