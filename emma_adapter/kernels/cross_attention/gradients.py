"""Cross-attention, backward: which kernels run, and how their sums are put together.

Of the chain ``x -> LN -> q -> attention o -> update z -> y`` only q and o were kept; LN(x), the softmax and, for
``modulate``, z are computed again, tile by tile. Sums over tokens (gradients of weights, keys and values) go through
partial sums that are added in a fixed order: no atomics, so that a backward gives the same bits every time.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..launch import Configuration, aligned, cdiv
from . import backward_products as products
from . import backward_softmax as softmax
from .backward_operands import BackwardOperands
from .layout import Layout, mask_bytes
from .tiles import BLOCKS, configuration, head_block, variants


@torch.library.custom_op("emma_adapter::cross_attention_backward", mutates_args=())
def cross_attention_backward(
    grad: Tensor,
    x: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor,
    instruction: Tensor | None,
    cu_seqlens: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    query_weight: Tensor,
    position: Tensor | None,
    position_start: Tensor | None,
    output_weight: Tensor,
    output_bias: Tensor,
    cast_weights: Tensor | None,
    query: Tensor,
    attended: Tensor,
    lse: Tensor,
    center: Tensor,
    rstd: Tensor,
    segments: int,
    num_heads: int,
    modulate: bool,
    need_visual: bool,
    need_instruction: bool,
    need_weights: bool,
) -> list[Tensor]:
    """Return gradients of x, key, value, norm scale and shift, W_q, b_q, position, W_o, b_o; empty where not needed."""
    empty = _empty_gradients(
        x, key, norm_weight, query_weight, position, output_weight, need_visual, need_instruction, need_weights
    )
    if len(x) == 0:
        return [gradient.zero_() for gradient in empty]
    operands = BackwardOperands(
        *(grad, x, key, value, key_mask, instruction, cu_seqlens, norm_weight, norm_bias, query_weight),
        *(position, position_start, output_weight, output_bias, cast_weights),
        *(query, attended, lse, center, rstd),
        segments=segments,
        num_heads=num_heads,
        modulate=modulate,
    )
    x_grad, key_grad, value_grad, *weight_grads = empty
    query_grad = _attention_gradients(operands, (key_grad, value_grad) if need_instruction else None)
    normed = {"center_ptr": center, "query_grad_ptr": query_grad}
    if need_visual:
        operands.launch(
            products.visual_backward,
            (operands.row_blocks,),
            {"MODULATE": modulate},
            **operands.visual,
            **normed,
            **operands.epilogue,
            **operands.sizes,
            query_weight_ptr=operands.factors[0],
            norm_weight_ptr=aligned(norm_weight, torch.float32),
            x_grad_ptr=x_grad,
            M=operands.tokens,
        )
    if need_weights:
        computed = _weight_gradients(operands, normed)
        weight_grads = [gradient.to(like.dtype) for gradient, like in zip(computed, weight_grads, strict=True)]
    return [x_grad, key_grad, value_grad, *weight_grads]


def _attention_gradients(operands: BackwardOperands, instruction_grads: tuple[Tensor, Tensor] | None) -> Tensor:
    """Return the gradient of the queries ``[M, I]``, and fill those of keys and values ``[R, T, I]`` if given."""
    attended_grad = torch.empty_like(operands.attended)
    operands.launch(
        products.output_backward,
        (operands.row_blocks * operands.inner_blocks,),
        operands.tiles_of_update,
        **operands.visual,
        **operands.epilogue,
        **operands.sizes,
        attended_grad_ptr=attended_grad,
        M=operands.tokens,
    )
    dtype, layout = operands.x.dtype, operands.layout
    head_dim = operands.inner // operands.num_heads
    attention = {
        "query_ptr": operands.query,
        "key_ptr": aligned(operands.key, dtype),
        "value_ptr": aligned(operands.value, dtype),
        "key_mask_ptr": mask_bytes(operands.key_mask),
        **layout.rows(),
        **layout.instructions(),
        "attended_grad_ptr": attended_grad,
        "lse_ptr": operands.lse,
        "delta_ptr": torch.empty_like(operands.lse),
        "T": operands.key.shape[1],
        "I": operands.inner,
        "head_dim": head_dim,
        "num_heads": operands.num_heads,
        "scale": 1 / math.sqrt(head_dim),
    }
    query_grad = torch.empty_like(operands.query)
    grid = (layout.slots(operands.block["BLOCK_M"]), operands.num_heads)
    operands.launch(
        softmax.query_backward, grid, {"BLOCK_H": head_block(head_dim)}, **attention, query_grad_ptr=query_grad
    )
    if instruction_grads is not None:
        _key_value_gradients(attention, layout, head_block(head_dim), *instruction_grads)
    return query_grad


def _weight_gradients(operands: BackwardOperands, normed: dict[str, Tensor]) -> list[Tensor]:
    """Return the gradients of norm scale and shift, W_q, b_q, position, W_o and b_o, float32."""
    width, inner, device = operands.width, operands.inner, operands.x.device
    # Enough programs for the largest devices; more partial sums would only cost memory.
    tiles = cdiv(width, operands.block["BLOCK_D"]) * operands.inner_blocks
    splits = min(cdiv(256, tiles), operands.row_blocks)
    rows_per_split = cdiv(operands.row_blocks, splits) * operands.block["BLOCK_M"]
    splits = cdiv(operands.tokens, rows_per_split)
    split = {"M": operands.tokens, "rows_per_split": rows_per_split}
    output_partial = torch.empty(splits, width, inner, dtype=torch.float32, device=device)
    bias_partial = torch.empty(splits, width, dtype=torch.float32, device=device)
    operands.launch(
        products.output_weight_backward,
        (tiles, splits),
        operands.tiles_of_update,
        **operands.visual,
        **operands.epilogue,
        **operands.sizes,
        **split,
        weight_partial_ptr=output_partial,
        bias_partial_ptr=bias_partial,
    )
    query_partial = torch.empty(splits, inner, width, dtype=torch.float32, device=device)
    operands.launch(
        products.query_weight_backward,
        (tiles, splits),
        {},
        **{name: operands.visual[name] for name in ("x_ptr", "lse_ptr", "rstd_ptr")},
        **normed,
        **operands.sizes,
        **split,
        weight_partial_ptr=query_partial,
    )
    # LN(x) = x_hat w + b, so that dq^T x_hat and the sum of dq give all of W_q's and the norm's gradients.
    # No torch.mm: it would run in half precision under autocast, and in tf32 where that is allowed.
    query_grad, normed_product = normed["query_grad_ptr"], query_partial.sum(0)
    query_bias_grad = query_grad.sum(0, dtype=torch.float32)
    query_weight, norm_weight, norm_bias = (
        aligned(weight, torch.float32) for weight in (operands.query_weight, operands.norm_weight, operands.norm_bias)
    )
    return [
        (query_weight * normed_product).sum(0),
        (query_weight * query_bias_grad[:, None]).sum(0),
        normed_product * norm_weight + query_bias_grad[:, None] * norm_bias,
        query_bias_grad,
        _position_gradient(operands, query_grad),
        output_partial.sum(0),
        bias_partial.sum(0),
    ]


def _key_value_gradients(
    attention: dict[str, Any], layout: Layout, head: int, key_grad: Tensor, value_grad: Tensor
) -> None:
    """Fill ``key_grad`` and ``value_grad`` ``[R, T, I]``."""
    dtype, device = key_grad.dtype, key_grad.device
    rows, length, inner = key_grad.shape
    block = BLOCKS[dtype]
    slots = layout.slots(block["CHUNK"])
    key_partial = torch.empty(slots, length, inner, dtype=torch.float32, device=device)
    partial = {"key_partial_ptr": key_partial, "value_partial_ptr": torch.empty_like(key_partial)}
    grid: tuple[int, ...] = (slots, attention["num_heads"], cdiv(length, block["BLOCK_T"]))
    configuration(softmax.key_value_backward, dtype, BLOCK_H=head).launch(grid, device, **attention, **partial)
    configuration(softmax.key_value_sum, dtype).launch(
        (rows, cdiv(length * inner, block["BLOCK_SUM"])),
        device,
        **partial,
        **layout.instructions(),
        **{name: value for name, value in layout.rows().items() if name != "search_steps"},
        key_grad_ptr=key_grad,
        value_grad_ptr=value_grad,
        width=length * inner,
    )


def _position_gradient(operands: BackwardOperands, query_grad: Tensor) -> Tensor:
    """Return the gradient of the positions, float32 ``[P, I]``, or empty if there are none."""
    position, position_start, inner = operands.position, operands.position_start, operands.inner
    if position is None:
        return query_grad.new_empty(0, dtype=torch.float32)
    if position_start is None:  # All segments have P tokens.
        return query_grad.view(operands.segments, -1, inner).sum(0, dtype=torch.float32)
    gradient = torch.empty(position.shape, dtype=torch.float32, device=query_grad.device)
    operands.launch(
        softmax.position_backward,
        (cdiv(len(position), operands.block["BLOCK_M"]), cdiv(inner, operands.block["BLOCK_T"])),
        {},
        query_grad_ptr=query_grad,
        position_start_ptr=position_start,
        cu_seqlens_ptr=operands.cu_seqlens,
        position_grad_ptr=gradient,
        P=len(position),
        I=inner,
        num_segments=operands.segments,
    )
    return gradient


@cross_attention_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor,
    instruction: Tensor | None,
    cu_seqlens: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    query_weight: Tensor,
    position: Tensor | None,
    position_start: Tensor | None,
    output_weight: Tensor,
    output_bias: Tensor,
    cast_weights: Tensor | None,
    query: Tensor,
    attended: Tensor,
    lse: Tensor,
    center: Tensor,
    rstd: Tensor,
    segments: int,
    num_heads: int,
    modulate: bool,
    need_visual: bool,
    need_instruction: bool,
    need_weights: bool,
) -> list[Tensor]:
    return _empty_gradients(
        x, key, norm_weight, query_weight, position, output_weight, need_visual, need_instruction, need_weights
    )


def _empty_gradients(
    x: Tensor,
    key: Tensor,
    norm_weight: Tensor,
    query_weight: Tensor,
    position: Tensor | None,
    output_weight: Tensor,
    need_visual: bool,
    need_instruction: bool,
    need_weights: bool,
) -> list[Tensor]:
    """Return contiguous tensors of the dtypes and shapes that :func:`cross_attention_backward` returns."""
    none = (0,)

    def like(tensor: Tensor, needed: bool, shape: tuple[int, ...] | None = None) -> Tensor:
        return tensor.new_empty((shape or tensor.shape) if needed else none)

    (inner, width), weights = query_weight.shape, need_weights
    return [
        like(x, need_visual),
        like(key, need_instruction),
        like(key, need_instruction),
        like(norm_weight, weights),
        like(norm_weight, weights),
        like(query_weight, weights),
        like(query_weight, weights, (inner,)),
        like(query_weight, False) if position is None else like(position, weights),
        like(output_weight, weights),
        like(output_weight, weights, (width,)),
    ]


def configurations() -> Iterator[Configuration]:
    for kernel in (
        *(products.output_backward, softmax.query_backward, softmax.key_value_backward, softmax.key_value_sum),
        *(products.query_weight_backward, products.output_weight_backward, softmax.position_backward),
        products.visual_backward,
    ):
        yield from variants(kernel)
