"""The segments and the weights of a call, in the form that the kernels take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..launch import aligned, cdiv


@dataclass(frozen=True)
class Layout:
    """S segments in M tokens, and each one's instruction.

    Args:
        tokens: M.
        segments: S.
        cu_seqlens: int32 ``[S + 1]``; None if all segments are equally long.
        instruction: int32 ``[S]``; None if segment s meets instruction s.
        unused: stands in for the pointers that are None; nobody reads it.
    """

    tokens: int
    segments: int
    cu_seqlens: Tensor | None
    instruction: Tensor | None
    unused: Tensor

    @classmethod
    def of(
        cls, tokens: int, segments: int, cu_seqlens: Tensor | None, instruction: Tensor | None, *, unused: Tensor
    ) -> Layout:
        """Return a layout; ``unused`` is any tensor with numbers of four bytes on the right device."""
        return cls(tokens, segments, cu_seqlens, instruction, unused.view(torch.int32))

    @property
    def tokens_a_segment(self) -> int:
        """The tokens of every segment; 0 if ``cu_seqlens`` says how many."""
        return self.tokens // self.segments if self.cu_seqlens is None else 0

    def slots(self, block: int) -> int:
        """Return the number of pieces of at most ``block`` tokens of one segment that ``segment_slice`` numbers."""
        if self.cu_seqlens is None:
            return self.segments * cdiv(self.tokens_a_segment, block)
        return cdiv(self.tokens, block) + self.segments

    def rows(self) -> dict[str, Any]:
        return {
            "cu_seqlens_ptr": self.unused if self.cu_seqlens is None else self.cu_seqlens,
            "N": self.tokens_a_segment,
            "num_segments": self.segments,
            "search_steps": self.segments.bit_length(),
        }

    def instructions(self) -> dict[str, Any]:
        return {
            "instruction_ptr": self.unused if self.instruction is None else self.instruction,
            "shared": int(self.instruction is not None),
        }


def mask_bytes(key_mask: Tensor) -> Tensor:
    """Return the mask as uint8, 1 at valid keys; a boolean one is not copied."""
    mask = key_mask if key_mask.dtype == torch.bool else key_mask != 0
    return mask.contiguous().view(torch.uint8)


def in_dtype(
    query_weight: Tensor, output_weight: Tensor, cast_weights: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return W_q and W_o as they are multiplied: from ``cast_weights [2, I D]``, or else cast here."""
    if cast_weights is None:
        return aligned(query_weight, dtype), aligned(output_weight, dtype)
    query, output = aligned(cast_weights)
    return query.view(query_weight.shape), output.view(output_weight.shape)
