"""``attention`` and ``modulation`` around other implementations of attention, as baselines."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor

from emma_adapter.alignment.fusion import AttentionFusion
from emma_adapter.alignment.fusion.cross_attention import CrossAttentionFusion

from .shapes import Inputs

Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Queries, keys and values ``[B, H, tokens, d]``, and which keys count, ``[B, T]``."""


def dense(fusion: CrossAttentionFusion, inputs: Inputs, attend: Attend) -> Tensor:
    """The fusion of images of one size."""
    cross = fusion.cross_attention
    query = cross.query(cross.visual_norm(inputs.visual))
    position = cross.positions(query.shape[1], None)
    if position is not None:
        query = query + position.to(query.dtype)
    instruction = cross.instruction_norm(inputs.instruction)
    # An instruction without a token attends to its padding, and is undone below.
    mask = inputs.mask | ~inputs.mask.any(dim=1, keepdim=True)
    query, key, value = (
        x.unflatten(-1, (cross.num_heads, -1)).transpose(1, 2)
        for x in (query, cross.key(instruction), cross.value(instruction))
    )
    update = cross.output(attend(query, key, value, mask).transpose(1, 2).flatten(2))
    instructed = inputs.mask.any(dim=1)[:, None, None]
    return torch.where(instructed, _updated(fusion, inputs.visual, update), inputs.visual)


def written_out(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Attention as it is written in formulas: two products and a softmax."""
    scores = query @ key.mT / query.shape[-1] ** 0.5
    weights = scores.masked_fill(~mask[:, None, None, :], -torch.inf).softmax(dim=-1)
    return weights @ value


def flex(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """PyTorch's FlexAttention, which is fast only when it is compiled."""
    from torch.nn.attention.flex_attention import flex_attention

    def keep_valid(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return torch.where(mask[b, k], score, -torch.inf)

    attended = flex_attention(query, key, value, score_mod=keep_valid)
    assert isinstance(attended, Tensor)
    return attended


def packed_varlen(fusion: CrossAttentionFusion, inputs: Inputs) -> Callable[[], Tensor]:
    """The fusion of images of any size in one row, with PyTorch's ``varlen_attn``. What depends on lengths alone is
    prepared once, which is to its advantage; every instruction must have a token."""
    assert inputs.packing is not None
    cross, device = fusion.cross_attention, inputs.visual.device
    grids, rows = inputs.packing.grids, inputs.packing.rows.tolist()
    keys = [row * inputs.mask.shape[1] + inputs.mask[row].nonzero().flatten() for row in rows]
    key_places = torch.cat(keys)
    query_lengths = inputs.packing.lengths
    key_lengths = [len(places) for places in keys]
    query_starts, key_starts = (
        torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
        for lengths in (query_lengths, key_lengths)
    )

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (cross.num_heads, -1))

    def run() -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        query = cross.query(cross.visual_norm(inputs.visual))
        positions = [cross.positions(length, grid) for length, grid in zip(query_lengths, grids, strict=True)]
        query = query + torch.cat([position for position in positions if position is not None]).to(query.dtype)
        instruction = cross.instruction_norm(inputs.instruction)
        key, value = (split(project(instruction).flatten(0, 1)[key_places]) for project in (cross.key, cross.value))
        attended = varlen_attn(split(query), key, value, query_starts, key_starts, max(query_lengths), max(key_lengths))
        assert isinstance(attended, Tensor)
        return _updated(fusion, inputs.visual, cross.output(attended.flatten(-2)))

    return run


def _updated(fusion: CrossAttentionFusion, visual: Tensor, update: Tensor) -> Tensor:
    if isinstance(fusion, AttentionFusion):
        return visual + update
    return visual * (2 * torch.sigmoid(update))
