"""Visual tokens after the projector: how many there are, and how they divide into media.

A projector merges each square of visual tokens, ``ModelFamily.projector_merge`` on a side, into one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import RoutingError, UnsupportedModelError
from .families import MediaLayout, ModelFamily

Grid = tuple[int, int]


class TokenSizes(NamedTuple):
    """Sizes of the visual tokens of an image, tile or frame."""

    #: Channels of a token.
    dim: int
    #: Number of tokens, and ``(height, width)`` in tokens, as ``ModelFamily.visual_size`` returns them.
    number: int | None
    grid: Grid | None


def token_sizes(family: ModelFamily, inner: nn.Module, *, projected: bool) -> TokenSizes:
    """Return the sizes of the visual tokens before the projector, or of those that it returns.

    Raises:
        UnsupportedModelError: if those that it returns are asked for, and can't be aligned.
    """
    if projected:
        require_alignable_output(family, inner)
    number, grid = family.visual_size(inner)
    if not projected:
        return TokenSizes(family.visual_dim(inner), number, grid)
    merge = family.projector_merge(inner)
    if number is not None:
        number //= merge**2
    # Projected tokens replace embeddings in the prompt.
    dim = int(inner.get_input_embeddings().weight.shape[1])  # type: ignore[operator]
    return TokenSizes(dim, number, None if grid is None else _merged(grid, merge))


def require_alignable_output(family: ModelFamily, inner: nn.Module) -> None:
    """Check that what a projector puts out can be aligned.

    Raises:
        UnsupportedModelError: if it can't.
    """
    if family.cannot_align_projected:
        raise UnsupportedModelError(
            f"behind the projector of {type(inner).__name__}, {family.projector_path!r}, nothing can be aligned: "
            f"{family.cannot_align_projected}. Align what it reads, EmmaConfig(place='before_projector'), and draw "
            "with another model"
        )


def joined(output: Tensor | Sequence[Tensor]) -> Tensor:
    """Return what a projector puts out as one tensor, where it may be one for each image."""
    return output if isinstance(output, Tensor) else torch.cat(list(output))


def divided_as(output: Tensor | Sequence[Tensor], tokens: Tensor) -> Tensor | list[Tensor]:
    """Return tokens divided as the output that was joined to them."""
    return tokens if isinstance(output, Tensor) else list(tokens.split([len(part) for part in output]))


def projected_layout(layout: MediaLayout, merge: int, projected: Tensor) -> MediaLayout:
    """Return how a projector's output divides into media, given the layout of its input.

    Args:
        layout: of the projector's input.
        merge: side of the square of visual tokens that became one.
        projected: the output, ``[entries, N, D]`` or ``[entries, height, width, D]``, or if packed ``[sum(N), D]`` or
            ``[1, sum(N), D]``.

    Raises:
        RoutingError: if the output doesn't fit this division.
    """
    grids = None if layout.grids is None else [_merged(grid, merge) for grid in layout.grids]
    if layout.packed:
        assert grids is not None
        expected, actual = sum(height * width for height, width in grids), projected.shape[:-1].numel()
    else:
        is_divided = projected.ndim == 3 or (grids is not None and {*grids} == {projected.shape[1:-1]})
        expected, actual = sum(layout.entries), projected.shape[0] if is_divided else -1
    if expected != actual:
        raise RoutingError(
            f"place='after_projector': the projector returned {list(projected.shape)}, which can't be divided into "
            f"{len(layout.entries)} images, videos or tiles: its family must say in projector_merge() how many visual "
            "tokens become one; or align what it reads, EmmaConfig(place='before_projector')"
        )
    orders = None
    if layout.orders is not None and merge > 1:
        orders = {_merged(grid, merge): _merged_order(order, grid, merge) for grid, order in layout.orders.items()}
    return dataclasses.replace(layout, grids=grids, orders=layout.orders if merge == 1 else orders)


def _merged(grid: Grid, merge: int) -> Grid:
    return grid[0] // merge, grid[1] // merge


def _merged_order(order: Tensor, grid: Grid, merge: int) -> Tensor:
    """Return the place of each merged token, if the tokens of a square follow one another."""
    y, x = order.view(-1, merge**2)[:, 0] // grid[1], order.view(-1, merge**2)[:, 0] % grid[1]
    return (y // merge) * (grid[1] // merge) + x // merge
