"""Which row of the batch an image belongs to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import RoutingError
from ..models.families import mismatch


def rows_of_media(
    placeholders: Tensor, tokens_per_medium: Sequence[int], *, repeats: int = 1, modality: str = "image"
) -> Tensor:
    """The row of each image (or video) of a batch.

    Media fill the placeholder tokens in the order of the batch, first row first, as transformers scatters them.

    Args:
        placeholders: ``[B]``, placeholder tokens in each row.
        tokens_per_medium: tokens that each medium takes in the language model, in order. A medium of 0 tokens, which
            no prompt shows, gets some row.
        repeats: how many times in succession each row stands in ``placeholders``.
        modality: what the media are, for the message of an error.

    Returns:
        ``[len(tokens_per_medium)]``, int64, on the device of ``placeholders``: rows before they were repeated.

    Raises:
        RoutingError: if totals differ, or a medium would cross from one row into the next.
    """
    lengths = torch.as_tensor(tokens_per_medium, device=placeholders.device)
    ends = lengths.cumsum(0)
    row_ends = placeholders.cumsum(0)
    rows = torch.searchsorted(row_ends, ends - lengths, right=True).clamp(max=len(placeholders) - 1) // repeats
    if not torch.compiler.is_compiling():
        last_rows = torch.searchsorted(row_ends, ends - 1, right=True) // repeats
        expected, found = int(lengths.sum()), int(placeholders.sum())
        if expected != found:
            raise RoutingError(
                f"{mismatch(modality, found, expected)}: {len(tokens_per_medium)} {modality}s take {expected} tokens, "
                f"but the prompts hold {found} placeholder tokens. Let the model's processor make text and images "
                "together, and let nothing cut them off (max_length, truncation)"
            )
        if bool(((rows != last_rows) & (lengths > 0)).any()):
            raise RoutingError(
                "an image would begin in one row of the batch and end in another (placeholder tokens per row: "
                f"{placeholders.tolist()}, tokens per image: {list(tokens_per_medium)}): give the images in the order "
                "of the rows, and let the model's processor make text and images together"
            )
    return rows
