"""The paper's fusion: one linear map over the token axis."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError, ShapeError
from .layers import CastingLinear, add_update
from .registry import Fusion, register_fusion

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
    """

    reads_padding = True
    fixed_num_visual_tokens = True

    def __init__(self, config: EmmaConfig) -> None:
        super().__init__(config)
        for name in ("num_visual_tokens", "max_instruction_tokens"):
            if getattr(config, name) is None:
                raise ConfigError(f'EmmaConfig.{name} must be given for fusion="linear": its weights have that size')
        assert config.visual_dim and config.instruction_dim
        assert config.num_visual_tokens and config.max_instruction_tokens
        n = config.num_visual_tokens
        self.instruction_projection = CastingLinear(config.instruction_dim, config.visual_dim)
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
        num_visual, num_columns = self.text_weight.shape
        if visual_tokens.shape[1] != num_visual:
            raise ShapeError(
                f'fusion="linear" was made for {num_visual} visual tokens an image and got {visual_tokens.shape[1]}; '
                'use fusion="attention" or "modulation" for images of any size'
            )
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
        dtype = visual_tokens.dtype
        text_weight = self.text_weight[:, :num_instruction].to(dtype)
        update = self._image_update(visual_tokens) + text_weight @ projected + self.bias.to(dtype)[:, None]
        return add_update(visual_tokens, update)

    def _image_update(self, visual_tokens: Tensor) -> Tensor:
        dtype = visual_tokens.dtype
        if hasattr(self, "image_weight"):
            return self.image_weight.to(dtype) @ visual_tokens
        return self.image_up.to(dtype) @ (self.image_down.to(dtype) @ visual_tokens)


def _blank(tokens: Tensor, mask: Tensor | None) -> Tensor:
    return tokens if mask is None else tokens.masked_fill(~mask[..., None], 0)
