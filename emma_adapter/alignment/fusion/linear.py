"""The paper's fusion: one linear map over the token axis."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import ConfigError, ShapeError
from .base import Fusion, register_fusion
from .dispatch import weights_elsewhere
from .layers import CastingLinear, add_update
from .linear_eager import mix_tokens
from .nonfinite import finite_values
from .packed_images import Grid
from .resampling import resample

if TYPE_CHECKING:
    from ..config import EmmaConfig


@register_fusion("linear")
class LinearFusion(Fusion):
    """EMMA's visual alignment: ``V + (dW_img V + W_txt T' + b)`` with ``T' = GELU(T P^T + p)``.

    See arXiv 2410.02080, section 3.

    The paper's image weight is ``W_img = I + dW_img``; storing the update keeps an untrained adapter exact in
    every dtype, where a product with an identity matrix would round. ``dW_img [N, N]`` (or ``A B`` of rank
    ``config.rank``), ``W_txt [N, T]`` and ``b [N]`` start at zero; ``P [D, Dt]`` starts as ``nn.Linear`` does.

    A masked instruction position contributes nothing. Without a mask every position counts, padding included,
    as in the paper.

    The weights live on the native grid, ``config.visual_grid``. For an image on another grid its visual tokens are
    resampled to the native one, and the update, ``dW_img V + W_txt T' + b``, back to the image's own grid, which is
    the same as resampling the rows of ``W_txt`` and ``b``. V itself is never resampled.
    """

    reads_padding = True
    has_kernel = True

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
        grid: Grid | None = None,
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
        if self.dispatch.takes_triton(
            visual_tokens, lambda: self._kernel_problem(visual_tokens, num_instruction, own_grid), trains=self.trains
        ):
            from ...kernels.token_mixing import token_mixing

            projected = projected.to(visual_tokens.dtype)
            return token_mixing(visual_tokens, projected, self.image_weight, text_weight, self.bias)
        if own_grid is None and hasattr(self, "image_weight"):
            return mix_tokens(visual_tokens, projected, self.image_weight, text_weight, self.bias)
        dtype = visual_tokens.dtype
        native_tokens = finite_values(visual_tokens)
        if own_grid is not None and self.native_grid is not None:
            native_tokens = resample(native_tokens, own_grid, self.native_grid, antialias=True)
        update = self._image_update(native_tokens) + text_weight.to(dtype) @ projected + self.bias.to(dtype)[:, None]
        if own_grid is not None and self.native_grid is not None:
            update = resample(update, self.native_grid, own_grid)
        return add_update(visual_tokens, update)

    def _kernel_problem(self, visual_tokens: Tensor, num_instruction: int, own_grid: Grid | None) -> str | None:
        """Return why the Triton kernels can't compute a call, or None."""
        from ...kernels.token_mixing import unsupported_reason

        if not hasattr(self, "image_weight"):
            return "the kernels are for a full image weight, and EmmaConfig.rank is given"
        if own_grid is not None:
            return f"the kernels are for images on the native grid {self.native_grid}, and this one's is {own_grid}"
        return weights_elsewhere(visual_tokens, self.bias) or unsupported_reason(visual_tokens, num_instruction)

    def _own_grid(self, num_visual_tokens: int, grid: Grid | None) -> Grid | None:
        """Return the grid of these visual tokens, or None if it is the native one."""
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
        # A sum over all tokens with random weights may be too large for float16, and 0 * Inf is NaN.
        wide = torch.float32 if dtype == torch.float16 else dtype
        return (self.image_up.to(wide) @ (self.image_down.to(wide) @ visual_tokens.to(wide))).to(dtype)


def _blank(tokens: Tensor, mask: Tensor | None) -> Tensor:
    return tokens if mask is None else tokens.masked_fill(~mask[..., None], 0)
