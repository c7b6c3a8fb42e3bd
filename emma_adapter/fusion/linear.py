"""The paper's fusion: one linear map over the token axis."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError, ShapeError
from .layers import CastingLinear, add_update
from .registry import Fusion, register_fusion
from .resampling import resample

if TYPE_CHECKING:
    from ..config import EmmaConfig


@register_fusion("linear")
class LinearFusion(Fusion):
    """``V + (dW_img V + W_txt T' + b)`` with ``T' = GELU(T P^T + p)``: EMMA's visual alignment, arXiv 2410.02080,
    section 3.

    The paper's image weight is ``W_img = I + dW_img``; storing the update keeps an untrained adapter exact in
    every dtype, where a product with an identity matrix would round. ``dW_img [N, N]`` (or ``A B`` of rank
    ``config.rank``), ``W_txt [N, T]`` and ``b [N]`` start at zero; ``P [D, Dt]`` starts as ``nn.Linear`` does.

    A masked instruction position contributes nothing. Without a mask every position counts, padding included,
    as in the paper.

    The weights live on the native grid, ``config.visual_grid``. For an image on another grid its visual tokens are
    resampled to the native one, and the update, ``dW_img V + W_txt T' + b``, back to the image's own; which is the
    same as resampling the rows of ``W_txt`` and ``b``. V itself is never resampled.
    """

    reads_padding = True

    def __init__(self, config: EmmaConfig) -> None:
        super().__init__(config)
        for name in ("num_visual_tokens", "max_instruction_tokens"):
            if getattr(config, name) is None:
                raise ConfigError(f'EmmaConfig.{name} must be given for fusion="linear": its weights have that size')
        assert config.visual_dim and config.instruction_dim
        assert config.num_visual_tokens and config.max_instruction_tokens
        n = config.num_visual_tokens
        self.instruction_projection = CastingLinear(config.instruction_dim, config.visual_dim)
        self.native_grid = config.visual_grid
        self.text_weight = nn.Parameter(torch.zeros(n, config.max_instruction_tokens))
        self.bias = nn.Parameter(torch.zeros(n))
        if config.rank is None:
            self.image_weight = nn.Parameter(torch.zeros(n, n))
        else:
            self.image_up = nn.Parameter(torch.zeros(n, config.rank))
            self.image_down = nn.Parameter(torch.randn(config.rank, n) / n**0.5)

    def forward(
        self,
        visual_tokens: Tensor,
        instruction_tokens: Tensor,
        instruction_mask: Tensor | None,
        grid: tuple[int, int] | None = None,
    ) -> Tensor:
        num_columns = self.text_weight.shape[1]
        own_grid = self._own_grid(visual_tokens.shape[1], grid)
        num_instruction = instruction_tokens.shape[1]
        if num_instruction > num_columns:
            raise ShapeError(
                f'fusion="linear" reads at most {num_columns} instruction tokens and got {num_instruction}; '
                "shorten the instruction or raise EmmaConfig.max_instruction_tokens before training"
            )
        # The padding is blanked before and after the projection: before, so that a NaN there can't reach the
        # weight gradient; after, because the projection has a bias.
        projected = F.gelu(self.instruction_projection(_blank(instruction_tokens, instruction_mask)))
        projected = _blank(projected, instruction_mask)
        text_weight = self.text_weight[:, :num_instruction]
        if own_grid is None and hasattr(self, "image_weight") and _Alignment.takes(visual_tokens, projected):
            aligned: Tensor = _Alignment.apply(visual_tokens, projected, self.image_weight, text_weight, self.bias)
            return aligned
        dtype = visual_tokens.dtype
        native_tokens = visual_tokens
        if own_grid is not None and self.native_grid is not None:
            native_tokens = resample(visual_tokens, own_grid, self.native_grid, antialias=True)
        update = self._image_update(native_tokens) + text_weight.to(dtype) @ projected + self.bias.to(dtype)[:, None]
        if own_grid is not None and self.native_grid is not None:
            update = resample(update, self.native_grid, own_grid)
        return add_update(visual_tokens, update)

    def _own_grid(self, num_visual_tokens: int, grid: tuple[int, int] | None) -> tuple[int, int] | None:
        """The grid of these visual tokens, or None if it is the native one."""
        if grid is not None and grid != self.native_grid:
            if self.native_grid is None:
                raise ShapeError(f"weights can't be resampled to grid={grid} without EmmaConfig.visual_grid")
            return grid
        native = self.text_weight.shape[0]
        if num_visual_tokens != native:
            raise ShapeError(
                f'fusion="linear" was made for {native} visual tokens an image and got {num_visual_tokens}; with '
                "EmmaConfig.visual_grid, grid=(height, width) resamples its weights"
            )
        return None

    def _image_update(self, visual_tokens: Tensor) -> Tensor:
        dtype = visual_tokens.dtype
        if hasattr(self, "image_weight"):
            return self.image_weight.to(dtype) @ visual_tokens
        return self.image_up.to(dtype) @ (self.image_down.to(dtype) @ visual_tokens)


class _Alignment(torch.autograd.Function):
    """``add_update(x, image_weight x + text_weight projected + bias)`` on the CPU, where fresh memory is what costs.

    Forward writes one tensor, in place; matrix products of a batch don't copy x or its transpose, as ``weight @ x``
    does. Backward leaves out the gradient of x if it is not needed, and adds the weight gradients of the images in
    place. Differentiable twice: backward consists of differentiable operations on saved inputs.
    """

    @staticmethod
    def takes(x: Tensor, projected: Tensor) -> bool:
        """A compiler finds its own way, and autocast mixes dtypes; other devices allocate from a cache."""
        return (
            x.device.type == "cpu"
            and x.dtype == projected.dtype
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
        )

    @staticmethod
    def forward(x: Tensor, projected: Tensor, image_weight: Tensor, text_weight: Tensor, bias: Tensor) -> Tensor:
        image_weight, text_weight, bias = (weight.to(x.dtype) for weight in (image_weight, text_weight, bias))
        update = torch.bmm(_repeated(image_weight, x), x)
        update.baddbmm_(_repeated(text_weight, x), projected)
        # x - ((0 - bias) - update): each subtraction keeps a zero positive, so that the last one keeps every x.
        torch.sub((0 - bias)[:, None], update, out=update)
        return torch.sub(x, update, out=update)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        *saved, bias = inputs
        ctx.bias_dtype = bias.dtype
        ctx.save_for_backward(*saved)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, projected, image_weight, text_weight = ctx.saved_tensors
        need_x, need_projected, need_image_weight, need_text_weight, need_bias = ctx.needs_input_grad
        dx = dprojected = dimage_weight = dtext_weight = dbias = None
        if need_x:
            dx = torch.bmm(_repeated(image_weight.to(dy.dtype).mT, dy), dy).add_(dy)
        if need_projected:
            dprojected = torch.bmm(_repeated(text_weight.to(dy.dtype).mT, dy), dy)
        if need_image_weight:
            dimage_weight = _sum_of_products(dy, x).to(image_weight.dtype)
        if need_text_weight:
            # Short times long is faster than long times short.
            dtext_weight = _sum_of_products(projected, dy).mT.to(text_weight.dtype)
        if need_bias:
            dbias = dy.sum((0, 2)).to(ctx.bias_dtype)
        return dx, dprojected, dimage_weight, dtext_weight, dbias

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *tensors: Tensor) -> tuple[Tensor, int]:
        def plain(x: Tensor, projected: Tensor, image_weight: Tensor, text_weight: Tensor, bias: Tensor) -> Tensor:
            image_weight, text_weight, bias = (weight.to(x.dtype) for weight in (image_weight, text_weight, bias))
            return add_update(x, image_weight @ x + text_weight @ projected + bias[:, None])

        return torch.vmap(plain, in_dims)(*tensors), 0


def _repeated(weight: Tensor, batch: Tensor) -> Tensor:
    """One view of the matrix an image."""
    return weight.expand(len(batch), -1, -1)


def _sum_of_products(left: Tensor, right: Tensor) -> Tensor:
    """``sum_b left[b] right[b]^T``, added up in float32 at least."""
    if left.dtype in (torch.float32, torch.float64):
        unread = left.new_empty(left.shape[1], right.shape[1])
        return torch.addbmm(unread, left, right.mT, beta=0)
    return torch.bmm(left, right.mT).sum(0, dtype=torch.float32)


def _blank(tokens: Tensor, mask: Tensor | None) -> Tensor:
    return tokens if mask is None else tokens.masked_fill(~mask[..., None], 0)
