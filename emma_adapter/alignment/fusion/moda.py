"""MoDA: a channel mask drawn by a decoder over visual tokens and instruction."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ...errors import ConfigError
from ...messages import listed, shown
from .base import Fusion, register_fusion
from .layers import CastingLayerNorm, CastingLinear
from .nonfinite import untouched_tokens

if TYPE_CHECKING:
    from ..config import EmmaConfig

#: The options of a new adapter, unless ``EmmaConfig.fusion_options`` says otherwise.
DEFAULTS: Mapping[str, float] = {"num_layers": 2, "dropout": 0.1, "mask_scale": 2.0}


class Attention(nn.Module):
    """Multi-head attention over ``dim`` channels; each projection has a bias."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = CastingLinear(dim, dim)
        self.key = CastingLinear(dim, dim)
        self.value = CastingLinear(dim, dim)
        self.output = CastingLinear(dim, dim)

    def forward(self, queries: Tensor, memory: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
        """Attend from queries to memory: ``[B, N, D], [B, T, D], bool [B, T] or None -> [B, N, D]``."""
        query, key, value = (
            rearrange(projected, "b n (h d) -> b h n d", h=self.num_heads)
            for projected in (self.query(queries), self.key(memory), self.value(memory))
        )
        keys = None if mask is None else mask[:, None, None, :]
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=keys, dropout_p=dropout)
        return self.output(rearrange(attended, "b h n d -> b n (h d)"))


class DecoderLayer(nn.Module):
    """A layer of the Transformer's decoder with norms behind its parts: ``torch.nn.TransformerDecoderLayer``, GELU.

    Its parts are attention between the visual tokens of an image, attention to the instruction, and a feed-forward
    network.
    """

    def __init__(self, dim: int, inner_dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.self_attention = Attention(dim, num_heads)
        self.cross_attention = Attention(dim, num_heads)
        self.expand = CastingLinear(dim, inner_dim)
        self.contract = CastingLinear(inner_dim, dim)
        self.norms = nn.ModuleList(CastingLayerNorm(dim) for _ in range(3))

    def forward(self, x: Tensor, instruction: Tensor, visual_mask: Tensor | None, mask: Tensor | None) -> Tensor:
        """Apply all parts: ``[B, N, D], [B, T, D], bool [B, N] or None, bool [B, T] or None -> [B, N, D]``."""
        dropout = self.dropout if self.training else 0.0
        x = self.norms[0](x + self._dropped(self.self_attention(x, x, visual_mask, dropout)))
        x = self.norms[1](x + self._dropped(self.cross_attention(x, instruction, mask, dropout)))
        return self.norms[2](x + self._dropped(self.contract(self._dropped(F.gelu(self.expand(x))))))

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


@register_fusion("moda")
class ModaFusion(Fusion):
    """``V * s sigmoid(W F(V, T))`` with F a decoder over the visual tokens of an image (arXiv 2506.01850).

    MoDA's mask has ``s = 1``. Here an adapter is made with ``s = 2`` and ``W = 0``, which is the identity. An empty
    instruction leaves V unchanged.
    """

    def __init__(self, config: EmmaConfig) -> None:
        super().__init__(config)
        assert config.visual_dim and config.instruction_dim
        options = _options(config)
        dim, heads = config.visual_dim, config.num_heads
        if config.instruction_dim != dim:
            raise ConfigError(
                f"fusion='moda' takes visual and instruction tokens of one width, and gets {dim} and "
                f"{config.instruction_dim}: EmmaConfig.moda() aligns what the projector makes, by the language model's "
                "own embeddings"
            )
        if dim % heads:
            raise ConfigError(f"EmmaConfig.num_heads is {heads}, which must divide the {dim} channels of moda's tokens")
        self.mask_scale = options["mask_scale"]
        self.layers = nn.ModuleList(
            DecoderLayer(dim, config.inner_dim, heads, options["dropout"]) for _ in range(int(options["num_layers"]))
        )
        self.mask = CastingLinear(dim, dim, bias=False)
        nn.init.zeros_(self.mask.weight)

    def forward(
        self,
        visual_tokens: Tensor,
        instruction_tokens: Tensor,
        instruction_mask: Tensor | None,
        grid: tuple[int, int] | None = None,
    ) -> Tensor:
        untouched = untouched_tokens(visual_tokens, instruction_mask)
        if untouched is None:
            return visual_tokens * self._mask(visual_tokens, instruction_tokens, instruction_mask, None)
        # Blanked before anything is computed from them: a NaN there would reach all gradients through `where`.
        blanked = visual_tokens.masked_fill(untouched, 0)
        visible = _never_empty(~untouched.squeeze(-1).expand(visual_tokens.shape[:2]))
        aligned = blanked * self._mask(blanked, instruction_tokens, instruction_mask, visible)
        return torch.where(untouched, visual_tokens, aligned)

    def _mask(
        self, visual: Tensor, instruction: Tensor, instruction_mask: Tensor | None, visible: Tensor | None
    ) -> Tensor:
        # No norm comes before the first projections, so that float16 may not hold their values.
        wide = torch.float32 if visual.dtype == torch.float16 else visual.dtype
        x, instruction = visual.to(wide), instruction.to(wide)
        if instruction_mask is not None:
            instruction = instruction.masked_fill(~instruction_mask[..., None], 0)
            instruction_mask = _never_empty(instruction_mask)
        for layer in self.layers:
            x = layer(x, instruction, visible, instruction_mask)
        return (self.mask_scale * torch.sigmoid(self.mask(x))).to(visual.dtype)


def _never_empty(mask: Tensor) -> Tensor:
    """Return the mask, all true in rows where nothing is valid: a softmax over no key is NaN."""
    return mask | ~mask.any(dim=1, keepdim=True)


def _options(config: EmmaConfig) -> dict[str, float]:
    """Return ``EmmaConfig.fusion_options``, completed by the defaults.

    Raises:
        ConfigError: if an option is not one of ``moda``'s, or its value is not allowed.
    """
    fusion_options: Mapping[str, Any] = config.fusion_options
    if unknown := sorted(set(fusion_options) - set(DEFAULTS)):
        raise ConfigError(f"fusion='moda' has no option(s) {listed(unknown)}; there are {sorted(DEFAULTS)}")
    options = {**DEFAULTS, **fusion_options}
    for name, low, high in (("num_layers", 1, 64), ("dropout", 0, 0.99), ("mask_scale", 1e-3, 1e3)):
        value = options[name]
        kinds = int if name == "num_layers" else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high or math.isnan(value):
            raise ConfigError(f"fusion_options[{name!r}] of moda must be from {low} to {high}; got {shown(value)}")
    return options
