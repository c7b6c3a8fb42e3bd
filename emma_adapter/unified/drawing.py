"""The velocity that a branch predicts for noisy latents, which follow a prompt that the base has read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..modules import private
from .layers import Prefix, text_model_of
from .prompts import has_planes
from .state import UnifiedState, compute_dtype


def grid_of(height: int, width: int, device: torch.device) -> Tensor:
    """Return the row and column of each latent, ``[height * width, 2]``, row by row."""
    rows, columns = torch.meshgrid(
        torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij"
    )
    return torch.stack([rows, columns], -1).flatten(0, 1)


class VelocityField:
    """The velocity v(x, t) of pictures behind prompts, which both the loss and the sampler evaluate.

    Args:
        model: unified.
        state: its state.
        prefix: B prompts, as the base has read them.
        grid: ``[B, N, 2]``, row and column of each latent.
        real: ``[B, N]``, False where a row has fewer latents than N.
        draws: R, how many noisy copies of each picture there are; they don't see each other.
        training: as in ``module.train(…)``; None: as in the base.
    """

    def __init__(
        self,
        model: nn.Module,
        state: UnifiedState,
        prefix: Prefix,
        grid: Tensor,
        real: Tensor,
        draws: int = 1,
        *,
        training: bool | None = None,
    ) -> None:
        inner: Any = state.family.inner(model)
        text: Any = text_model_of(inner)
        self.module = state.module
        self.dtype = compute_dtype(text)
        self.stack: Any = self.module.stack(text, self.dtype, training=training)
        self.cache_name = private.cache_argument(type(text))
        self.prefix, self.grid, self.draws = prefix, grid, draws
        self.positions = target_positions(prefix.start, grid, draws, planes=has_planes(inner))
        self.mask = additive_mask(prefix.mask, real, draws, self.dtype)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the velocity, of the same shape as ``x``.

        Args:
            x: ``[B, R, N, C]``.
            t: ``[B, R]``.
        """
        tokens = self.module.embed(x, t, self.grid)
        hidden = self.stack(
            inputs_embeds=tokens.flatten(1, 2).to(self.dtype),
            attention_mask=self.mask,
            position_ids=self.positions,
            **{self.cache_name: self.prefix.cache()},
        )[0]
        return self.module.read_velocity(hidden).view(x.shape)


def target_positions(start: Tensor, grid: Tensor, draws: int, *, planes: bool) -> Tensor:
    """Return the positions of latents behind prompts.

    They are ``[B, R·N]``, one after another; with M-RoPE ``[3, B, R·N]``: (s, s + row, s + column), where M-RoPE would
    put the tokens of a picture.

    Args:
        start: s, ``[B]``, the first position after each prompt.
        grid: ``[B, N, 2]``, row and column of each latent.
        draws: R; each starts at s.
        planes: whether positions are M-RoPE's.
    """
    if planes:
        offsets = torch.stack([torch.zeros_like(grid[..., 0]), grid[..., 0], grid[..., 1]])
        return (start[:, None] + offsets).repeat(1, 1, draws)
    offsets = torch.arange(grid.shape[1], device=start.device)
    return (start[:, None] + offsets).repeat(1, draws)


def additive_mask(prompt: Tensor, real: Tensor, draws: int, dtype: torch.dtype) -> Tensor:
    """Return the additive attention mask ``[B, 1, R·N, P + R·N]``: a latent sees its prompt and its own draw's latents.

    Args:
        prompt: ``[B, P]``, True at the prompt's tokens.
        real: ``[B, N]``, True at latents, False at padding.
        draws: R.
        dtype: of the scores. Eager attention would add a mask of booleans as zeros and ones.
    """
    rows, latents = real.shape
    draw = torch.arange(draws, device=real.device).repeat_interleave(latents)
    same_draw = draw[:, None] == draw[None]
    sees_latents = (same_draw & real.repeat(1, draws)[:, None]).expand(rows, -1, -1)
    sees_prompt = prompt.to(real.device)[:, None].expand(rows, draws * latents, -1)
    seen = torch.cat([sees_prompt, sees_latents], -1)[:, None]
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
