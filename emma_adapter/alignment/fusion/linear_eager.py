"""The eager form of the paper's visual alignment: ``x + (W_img x + W_txt T' + b)`` along the token axis."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from ...modules.private import is_transformed
from .layers import add_update
from .nonfinite import finite_values, may_look


def mix_tokens(x: Tensor, projected: Tensor, image_weight: Tensor, text_weight: Tensor, bias: Tensor) -> Tensor:
    """Align ``[B, N, D], [B, T, D], [N, N], [N, T], [N] -> [B, N, D]``; bit for bit x while the weights are zero.

    Values of x that aren't finite stay where they are, and count as zero for the others.
    """
    # A compiler optimises the plain form itself, and autocast mixes dtypes.
    if (
        type(x) is Tensor
        and x.device.type in ("cpu", "cuda")
        and x.dtype == projected.dtype
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined]
        and not torch.is_autocast_enabled(x.device.type)
    ):
        tensors = (x, projected, image_weight, text_weight, bias)
        if torch.is_grad_enabled() or _is_transformed(*tensors):
            y: Tensor = MixTokens.apply(*tensors)
            return y
        # In a small call, preparing for derivatives, as apply does, takes as long as all operations.
        return MixTokens.forward(*tensors)
    return _plain(x, projected, image_weight, text_weight, bias)


def _plain(x: Tensor, projected: Tensor, image_weight: Tensor, text_weight: Tensor, bias: Tensor) -> Tensor:
    image_weight, text_weight, bias = (weight.to(x.dtype) for weight in (image_weight, text_weight, bias))
    return add_update(x, image_weight @ finite_values(x) + text_weight @ projected + bias[:, None])


class MixTokens(torch.autograd.Function):
    """``add_update(x, image_weight x + text_weight projected + bias)``, in few passes, with little fresh memory.

    Forward writes one tensor, in place; matrix products of a batch don't copy x or its transpose, as ``weight @ x``
    does. Backward leaves out the gradient of x if it is not needed, and adds the weight gradients of the images in
    place. Differentiable twice: backward consists of differentiable operations on saved inputs.
    """

    @staticmethod
    def forward(x: Tensor, projected: Tensor, image_weight: Tensor, text_weight: Tensor, bias: Tensor) -> Tensor:
        image_weight, text_weight, bias = (weight.to(x.dtype) for weight in (image_weight, text_weight, bias))
        if not may_look(x):
            finite = x.nan_to_num(0.0, 0.0, 0.0)
            negated = MixTokens._negated_update(finite, projected, image_weight, text_weight, bias)
            return torch.sub(x, negated, out=negated)
        negated = MixTokens._negated_update(x, projected, image_weight, text_weight, bias)
        # Every update is a sum over all tokens of the image, so that a token that isn't finite shows in the first one.
        if not _all_finite(negated[:, 0]):
            finite = x.nan_to_num(0.0, 0.0, 0.0)
            negated = MixTokens._negated_update(finite, projected, image_weight, text_weight, bias)
        return torch.sub(x, negated, out=negated)

    @staticmethod
    def _negated_update(
        x: Tensor, projected: Tensor, image_weight: Tensor, text_weight: Tensor, bias: Tensor
    ) -> Tensor:
        """Return the update's negative, which is 0.0 and not -0.0 where all weights are zero.

        It starts at 0 - bias, which is never -0.0. Subtracting 0.0 leaves every x as it is bit for bit, -0.0 too.
        """
        negated = torch.baddbmm((0 - bias)[None, :, None], _repeated(text_weight, x), projected, alpha=-1)
        return negated.baddbmm_(_repeated(image_weight, x), x, alpha=-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        *saved, bias = inputs
        ctx.bias_dtype = bias.dtype
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, projected, image_weight, text_weight = ctx.saved_tensors
        need_x, need_projected, need_image_weight, need_text_weight, need_bias = ctx.needs_input_grad
        dx = dprojected = dimage_weight = dtext_weight = dbias = None
        if need_x:
            dx = torch.bmm(_repeated(image_weight.to(dy.dtype).mT, dy), dy).add_(dy)
        if need_projected:
            dprojected = torch.bmm(_repeated(text_weight.to(dy.dtype).mT, dy), dy)
        if need_image_weight:
            dimage_weight = _image_weight_gradient(dy, x).to(image_weight.dtype)
        if need_text_weight:
            # A short matrix times a long one is faster than long times short.
            dtext_weight = _sum_of_products(projected, dy).mT.to(text_weight.dtype)
        if need_bias:
            dbias = dy.sum((0, 2)).to(ctx.bias_dtype)
        return dx, dprojected, dimage_weight, dtext_weight, dbias

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        x, projected, image_weight, text_weight = ctx.saved_tensors
        dx, dprojected, dimage_weight, dtext_weight, dbias = tangents
        dy = torch.zeros_like(x)
        if dx is not None:
            dy = dy + dx + image_weight.to(x.dtype) @ dx
        if dprojected is not None:
            dy = dy + text_weight.to(x.dtype) @ dprojected
        if dimage_weight is not None:
            dy = dy + dimage_weight.to(x.dtype) @ finite_values(x)
        if dtext_weight is not None:
            dy = dy + dtext_weight.to(x.dtype) @ projected
        return dy if dbias is None else dy + dbias.to(x.dtype)[:, None]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *tensors: Tensor) -> tuple[Tensor, int]:
        return torch.vmap(_plain, in_dims)(*tensors), 0


# Every apply asks for the signature, and would inspect the function anew if it weren't kept here.
MixTokens.forward.__signature__ = inspect.signature(MixTokens.forward)  # type: ignore[attr-defined]


def _is_transformed(*tensors: Tensor) -> bool:
    """Return whether torch.func or forward mode runs, which needs ``apply`` even if no gradients are recorded."""
    return is_transformed() or any(unpack_dual(tensor).tangent is not None for tensor in tensors)


def _all_finite(tensor: Tensor) -> bool:
    """Return whether all values, and their sum, are finite.

    If only the sum isn't, what follows is slower, but gives the same.
    """
    return math.isfinite(tensor.sum().item())


def _repeated(weight: Tensor, batch: Tensor) -> Tensor:
    """Return the matrix once for each image of a batch, without a copy."""
    return weight.expand(len(batch), -1, -1)


def _image_weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """Return ``sum_b dy[b] x[b]^T`` over the values of x that are finite."""
    if may_look(x):
        gradient = _sum_of_products(dy, x)
        # As in forward: what isn't finite shows in the first row.
        if _all_finite(gradient[0]):
            return gradient
    return _sum_of_products(dy, x.nan_to_num(0.0, 0.0, 0.0))


def _sum_of_products(left: Tensor, right: Tensor) -> Tensor:
    """Return ``sum_b left[b] right[b]^T``, added up in float32 at least."""
    if len(left) == 1:
        return left[0] @ right[0].mT
    # On a GPU, addbmm computes one product after another.
    if left.device.type == "cpu" and left.dtype in (torch.float32, torch.float64):
        unread = left.new_empty(left.shape[1], right.shape[1])
        return torch.addbmm(unread, left, right.mT, beta=0)
    return torch.bmm(left, right.mT).sum(0, dtype=torch.promote_types(left.dtype, torch.float32))
