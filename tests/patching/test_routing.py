from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emma_adapter import RoutingError
from emma_adapter.patching.routing import rows_of_media

batches = st.lists(st.lists(st.integers(1, 9), max_size=4), min_size=1, max_size=6)


@given(batches)
def test_every_medium_goes_to_the_row_that_masked_scatter_fills_with_it(batch):
    """The batch as transformers sees it: placeholders row by row, filled in order by ``masked_scatter``."""
    lengths = [length for row in batch for length in row]
    width = max(1, *(sum(row) for row in batch))
    is_placeholder = torch.zeros(len(batch), width, dtype=torch.bool)
    for row, media in enumerate(batch):
        is_placeholder[row, width - sum(media) :] = sum(media) > 0
    numbers = torch.cat([torch.full((length,), number) for number, length in enumerate(lengths)] or [torch.zeros(0)])
    filled = torch.full(is_placeholder.shape, -1).masked_scatter(is_placeholder, numbers.long())
    expected = [int((filled == number).any(dim=1).nonzero()) for number in range(len(lengths))]
    assert rows_of_media(is_placeholder.sum(1), lengths).tolist() == expected


@given(batches.filter(any), st.integers(-3, 3).filter(bool))
def test_totals_that_differ_are_an_error(batch, difference):
    lengths = [length for row in batch for length in row]
    counts = torch.tensor([sum(row) for row in batch])
    counts[-1] = max(0, int(counts[-1]) + difference)
    if int(counts.sum()) == sum(lengths):
        counts[-1] += 1
    with pytest.raises(RoutingError, match="placeholder"):
        rows_of_media(counts, lengths)


def test_a_medium_across_two_rows_is_an_error():
    with pytest.raises(RoutingError, match="row"):
        rows_of_media(torch.tensor([3, 1]), [2, 2])
    assert rows_of_media(torch.tensor([2, 0, 2]), [2, 2]).tolist() == [0, 2]
