"""Several samples packed into one row of a batch, separated by their positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..errors import InstructionError

# Arguments that packing collators, transformers' and others, add to a call.
_PACKING_ARGUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")


@dataclass(frozen=True)
class Samples:
    """The positions of a packed batch's samples: ``(row, start, end)`` of each, in order."""

    spans: Sequence[tuple[int, int, int]]

    def unpack(self, packed: Tensor, fill: float) -> Tensor:
        """Turn ``[B, L]`` into one row per sample, ``[samples, longest]``, padded with ``fill`` on the right."""
        return pad_sequence(
            [packed[row, start:end] for row, start, end in self.spans], batch_first=True, padding_value=fill
        )

    def valid(self, mask: Tensor | None) -> Tensor:
        """Return bool ``[samples, longest]``, true at the samples' own tokens that ``mask`` doesn't exclude."""
        if mask is not None:
            return self.unpack(mask.bool(), False)
        lengths = torch.tensor([end - start for _, start, end in self.spans])
        return torch.arange(int(lengths.max())) < lengths[:, None]


def find_samples(arguments: Mapping[str, Any], shape: Sequence[int], *, required: bool) -> Samples | None:
    """Return the samples packed in the rows of a call with ids of this shape, or None if each row is one sample.

    A sample begins where ``position_ids`` decrease, or where the number in an ``attention_mask`` of sample numbers
    changes.

    Raises:
        InstructionError: if ``required``, and the call's arguments say that samples are packed, but not where they
            begin.
    """
    mask, positions = arguments.get("attention_mask"), arguments.get("position_ids")
    rows, length = shape
    begins = torch.zeros(rows, length, dtype=torch.bool)
    valid = torch.ones(rows, length, dtype=torch.bool)
    if isinstance(mask, Tensor) and mask.shape == torch.Size(shape):
        mask = mask.cpu()
        valid = mask != 0
        # Sample numbers 1, 2, 3, … in place of ones.
        begins[:, 1:] |= (mask[:, 1:] != mask[:, :-1]) & valid[:, 1:] & valid[:, :-1]
    text_positions = _text_positions(positions, shape)
    if text_positions is not None:
        begins[:, 1:] |= (text_positions[:, 1:] < text_positions[:, :-1]) & valid[:, 1:] & valid[:, :-1]
    elif required and (argument := _packing_argument(arguments)):
        raise InstructionError(
            f"{argument} says that several samples are packed in one row, but not where their images belong: pass "
            "position_ids that begin anew with each sample, or instruction= with one per row, or don't pack"
        )
    if not bool(begins.any()):
        return None
    spans = []
    for row in range(rows):
        starts = [0, *begins[row].nonzero().flatten().tolist(), length]
        spans += [(row, start, end) for start, end in pairwise(starts)]
    return Samples(spans)


def _text_positions(positions: Any, shape: Sequence[int]) -> Tensor | None:
    """Return positions ``[B, L]`` on the CPU, or None if they have another shape.

    M-RoPE's ``[3 or 4, B, L]`` begin with text or temporal positions, neither of which decreases within a sample.
    """
    if not isinstance(positions, Tensor) or positions.ndim not in (2, 3):
        return None
    if positions.ndim == 3:
        positions = positions[0]
    if positions.shape[-1] != shape[1] or positions.shape[0] not in (1, shape[0]):
        return None
    return positions.cpu().expand(*shape)


def _packing_argument(arguments: Mapping[str, Any]) -> str | None:
    for name in _PACKING_ARGUMENTS:
        if arguments.get(name) is not None:
            return name
    mask = arguments.get("attention_mask")
    return "a four-dimensional attention_mask" if isinstance(mask, Tensor) and mask.ndim == 4 else None
