"""Visual tokens of images of different sizes, one after another in one tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Grid = tuple[int, int]


@dataclass(frozen=True)
class Packing:
    """How S entries (images, frames or tiles) lie in packed visual tokens ``[M, D]``.

    Args:
        grids: ``(height, width)`` of each entry in visual tokens; together M.
        rows: integers ``[S]``, the row of the instruction that each entry meets.
        orders: where the tokens of a grid don't lie row by row: for each token of an entry, its place in raster
            order ``[height * width]``.
    """

    grids: Sequence[Grid]
    rows: Tensor
    orders: Mapping[Grid, Tensor] | None = None

    @property
    def lengths(self) -> list[int]:
        """How many visual tokens each entry has."""
        return [height * width for height, width in self.grids]

    def order(self, grid: Grid, device: torch.device) -> Tensor | None:
        return None if self.orders is None else self.orders[grid].to(device)


def by_grid(
    align: Callable[[Tensor, Tensor, Tensor | None, Grid], Tensor],
    visual_tokens: Tensor,
    instruction_tokens: Tensor,
    instruction_mask: Tensor | None,
    packing: Packing,
) -> Tensor:
    """``[M, D], [R, T, Dt], bool [R, T] or None -> [M, D]``: entries of the same grid are aligned together."""
    pieces = list(visual_tokens.split(packing.lengths))
    members: dict[Grid, list[int]] = {}
    for entry, grid in enumerate(packing.grids):
        members.setdefault(grid, []).append(entry)
    all_rows = packing.rows.to(instruction_tokens.device)
    for grid, entries in members.items():
        rows = all_rows[torch.as_tensor(entries, device=all_rows.device)]
        mask = None if instruction_mask is None else instruction_mask[rows]
        batch = torch.stack([pieces[entry] for entry in entries])
        order = packing.order(grid, batch.device)
        if order is not None:
            batch = batch[:, order.argsort()]
        aligned = align(batch, instruction_tokens[rows], mask, grid)
        if order is not None:
            aligned = aligned[:, order]
        for entry, piece in zip(entries, aligned.unbind(0), strict=True):
            pieces[entry] = piece
    return torch.cat(pieces) if pieces else visual_tokens
