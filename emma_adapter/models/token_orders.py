"""Orders in which vision towers put out visual tokens, other than row by row."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any

import torch
from torch import Tensor


def _cached(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Cache the tensors that ``make`` returns, made outside inference mode as later calls may train with them."""
    make = torch.inference_mode(False)(make)
    make_cached = lru_cache(maxsize=1024)(make)

    @wraps(make)
    def get(*arguments: Any) -> Tensor:
        # torch.compile warns about a cache and bypasses it: the tensor is computed in its graph.
        return make(*arguments) if torch.compiler.is_compiling() else make_cached(*arguments)

    return get


@_cached
def block_order(grid: tuple[int, int], merge: int) -> Tensor:
    """Return the place of each visual token where they come block by block, as before a merger of squares.

    Blocks of ``merge x merge`` tokens follow one another row by row, and so do the tokens of a block. For
    ``MediaLayout.orders``.

    Args:
        grid: height and width in visual tokens, multiples of ``merge``.
        merge: side of a block.

    Returns:
        ``[h * w]``, int64: ``y * w + x`` of each token, in the order in which they come.
    """
    height, width = grid
    places = torch.arange(height * width).view(height // merge, merge, width // merge, merge)
    return places.transpose(1, 2).reshape(-1)


@_cached
def window_order(grid: tuple[int, int], merge: int, window: int) -> Tensor:
    """Return the place of each visual token where blocks of them are sorted by the attention window they are in.

    As :func:`block_order`, but windows follow one another row by row, with the blocks of each row by row inside them.

    Args:
        grid: height and width in visual tokens, multiples of ``merge``.
        merge: side of a block.
        window: side of a window in blocks; those at the right and lower edge may be smaller.

    Returns:
        ``[h * w]``, int64: ``y * w + x`` of each token, in the order in which they come.
    """
    rows, columns = grid[0] // merge, grid[1] // merge
    window_row = torch.arange(rows)[:, None] // window
    window_column = torch.arange(columns)[None, :] // window
    windows_per_row = -(-columns // window)
    sorted_blocks = torch.argsort((window_row * windows_per_row + window_column).flatten(), stable=True)
    return block_order(grid, merge).view(-1, merge**2)[sorted_blocks].flatten()
