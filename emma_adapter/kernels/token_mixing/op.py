"""The paper's visual alignment as one product: every visual token is updated from all tokens and the instruction.

``y[b] = x[b] + (dW_img x[b] + W_txt T'[b] + bias)``, along the token axis. As a matrix product for each image:

    [dW_img | W_txt]   N x (N + T)   times   [x[b] ; T'[b]]   (N + T) x D

Neither concatenation of activations is written: the loop over the inner dimension first runs over visual tokens, then
over instruction tokens. The weights, which are small, are packed once a call: in the dtype of x, side by side, and
padded with zeros to whole blocks, so that their rows are aligned whatever N is (729 for SigLIP) and need no mask.

Backward runs two products over the same virtual matrices: ``[dW_img | W_txt]^T dy`` is the gradient of the inputs,
``dy [x ; T']^T`` that of the weights. The latter sums over images and channels. It is split into parts, by shape
alone, which are then added in a fixed order, not by atomics, so that the same inputs give the same bits.

Sizes: B images of N visual tokens of width D, with T instruction tokens each; K columns of packed weights.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import KernelError, ShapeError
from ..launch import aligned, refuse_forward_mode, visual_tokens_problem
from . import backward, forward
from .tiles import MAX_INSTRUCTION_TOKENS, PADDING, round_up


def token_mixing_reference(
    x: Tensor, projected: Tensor, image_weight: Tensor, text_weight: Tensor, bias: Tensor
) -> Tensor:
    """Compute :func:`token_mixing` in any dtype and on any device."""
    return x + (image_weight @ x + text_weight @ projected + bias[:, None])


# --- operators -------------------------------------------------------------------------------------------------


@torch.library.custom_op("emma_adapter::token_mixing", mutates_args=())
def _token_mixing(x: Tensor, projected: Tensor, image_weight: Tensor, text_weight: Tensor, bias: Tensor) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if len(x):
        forward.mix(x, projected, image_weight, text_weight, bias, y)
    return y


@_token_mixing.register_fake
def _(x: Tensor, projected: Tensor, image_weight: Tensor, text_weight: Tensor, bias: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("emma_adapter::token_mixing_backward", mutates_args=())
def _token_mixing_backward(
    dy: Tensor,
    x: Tensor,
    projected: Tensor,
    image_weight: Tensor,
    text_weight: Tensor,
    need_x: bool,
    need_projected: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, projected and, in float32, the weights and the bias; empty where not needed."""
    gradients = _empty_gradients(x, projected, need_x, need_projected, need_weights)
    dx, dprojected, *dweights = gradients
    if x.shape[0] == 0:
        for gradient in dweights:
            gradient.zero_()
        return gradients
    dy = aligned(dy)
    if need_x or need_projected:
        packed = forward.pack(image_weight, text_weight, x.dtype)
        backward.input_gradients(dy, packed, dx if need_x else None, dprojected if need_projected else None)
    if need_weights:
        backward.weight_gradients(dy, aligned(x), aligned(projected), *dweights)
    return gradients


@_token_mixing_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    projected: Tensor,
    image_weight: Tensor,
    text_weight: Tensor,
    need_x: bool,
    need_projected: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _empty_gradients(x, projected, need_x, need_projected, need_weights)


def _empty_gradients(
    x: Tensor, projected: Tensor, need_x: bool, need_projected: bool, need_weights: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def empty(needed: bool, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape if needed else 0, dtype=dtype, device=x.device)

    n, t = x.shape[1], projected.shape[1]
    return (
        empty(need_x, *x.shape, dtype=x.dtype),
        empty(need_projected, *projected.shape, dtype=x.dtype),
        empty(need_weights, n, n, dtype=torch.float32),
        empty(need_weights, n, t, dtype=torch.float32),
        empty(need_weights, n, dtype=torch.float32),
    )


def _save_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    x, projected, image_weight, text_weight, bias = inputs
    ctx.bias_dtype = bias.dtype
    ctx.save_for_backward(x, projected, image_weight, text_weight)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, projected, image_weight, text_weight = ctx.saved_tensors
    need_x, need_projected, *need_weights = ctx.needs_input_grad
    dx, dprojected, dimage_weight, dtext_weight, dbias = _token_mixing_backward(
        dy, x, projected, image_weight, text_weight, need_x, need_projected, any(need_weights)
    )
    gradients = (
        dx,
        dprojected,
        dimage_weight.to(image_weight.dtype),
        dtext_weight.to(text_weight.dtype),
        dbias.to(ctx.bias_dtype),
    )
    return tuple(gradient if needed else None for gradient, needed in zip(gradients, ctx.needs_input_grad, strict=True))


_token_mixing.register_autograd(_backward, setup_context=_save_inputs)


# --- public ----------------------------------------------------------------------------------------------------


def unsupported_reason(x: Tensor, num_instruction_tokens: int) -> str | None:
    """Return why :func:`token_mixing` can't take x ``[B, N, D]`` with so many instruction tokens, or None."""
    _, n, d = x.shape
    if problem := visual_tokens_problem(x):
        return problem
    if n == 0 or not 0 < num_instruction_tokens <= MAX_INSTRUCTION_TOKENS:
        return (
            f"it needs at least one visual token and 1 to {MAX_INSTRUCTION_TOKENS} instruction tokens; "
            f"got {n} and {num_instruction_tokens}"
        )
    # Within one image offsets are of 32 bits, beyond it of 64.
    if max(n * d, round_up(n) * (round_up(n) + PADDING)) >= 2**31:
        return f"{n} visual tokens of width {d} are more than the kernel can address"
    return None


def token_mixing(x: Tensor, projected: Tensor, image_weight: Tensor, text_weight: Tensor, bias: Tensor) -> Tensor:
    """Compute ``x + (image_weight x + text_weight projected + bias)`` along the token axis, on a GPU.

    The result is bit for bit x while the weights are zero. Products are summed in float32; in half precision, their
    factors are rounded to the dtype of x. Differentiable once in every argument; the same inputs give gradients of the
    same bits. Neither forward nor backward waits for the GPU. Values of x that aren't finite stay where they are, and
    count as zero for all others and in the weights' gradients.

    Args:
        x: visual tokens ``[B, N, D]``, float32, float16 or bfloat16; D a multiple of 16.
        projected: instruction tokens ``[B, T, D]`` in the dtype of x, T at most 128; masked ones are zero.
        image_weight: ``[N, N]``.
        text_weight: ``[N, T]``.
        bias: ``[N]``.

    Returns:
        ``[B, N, D]`` in the dtype of x, contiguous.

    Raises:
        KernelError: with :func:`unsupported_reason`, if there is one.
        ShapeError: if tensors don't fit each other.
    """
    tensors = (x, projected, image_weight, text_weight, bias)
    refuse_forward_mode(*tensors)
    if x.ndim != 3 or projected.ndim != 3:
        raise ShapeError(
            f"x and projected must be [B, N, D] and [B, T, D]; got {list(x.shape)} and {list(projected.shape)}"
        )
    batch, n, d = x.shape
    t = projected.shape[1]
    shapes = [(batch, n, d), (batch, t, d), (n, n), (n, t), (n,)]
    if [tuple(tensor.shape) for tensor in tensors] != shapes:
        raise ShapeError(
            f"shapes {[list(tensor.shape) for tensor in tensors]} should be {[list(shape) for shape in shapes]}"
        )
    if projected.dtype != x.dtype:
        raise ShapeError(f"x and projected must have the same dtype; got {x.dtype} and {projected.dtype}")
    if reason := unsupported_reason(x, t):
        raise KernelError(reason)
    y: Tensor = _token_mixing(x, projected, image_weight, text_weight, bias)
    return y
