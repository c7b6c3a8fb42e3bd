"""Visual tokens of images of different sizes, one after another in one tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

Grid = tuple[int, int]


@dataclass(frozen=True)
class Packing:
    """The order of S entries (images, frames or tiles) in packed visual tokens ``[M, D]``.

    Args:
        grids: ``(height, width)`` of each entry in visual tokens, which add up to M.
        rows: integers ``[S]``, the row of each entry's instruction.
        orders: where the tokens of a grid don't lie row by row: for each token of an entry, its place in raster
            order ``[height * width]``.
    """

    grids: Sequence[Grid]
    rows: Tensor
    orders: Mapping[Grid, Tensor] | None = None
    # Tensors on their devices, for the next call: a CUDA graph reads them again whenever it runs.
    _sent: dict[Any, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.grids, self.rows, self.orders)

    @property
    def lengths(self) -> list[int]:
        """The number of visual tokens of each entry."""
        return [height * width for height, width in self.grids]

    def order(self, grid: Grid, device: torch.device) -> Tensor | None:
        orders = self.orders
        return None if orders is None else self._on(device, ("order", grid), lambda: orders[grid])

    def rows_on(self, device: torch.device) -> Tensor:
        return self._on(device, "rows", lambda: self.rows)

    def starts(self, device: torch.device) -> Tensor:
        """Return int32 ``[S + 1]``: entry s is tokens ``starts[s]`` to ``starts[s + 1]``."""
        return self._on(device, "starts", lambda: _integers([0, *accumulate(self.lengths)]))

    def table_starts(self, device: torch.device) -> Tensor:
        """Return int32 ``[S]``: where each entry's grid begins in a table of all tokens of each different grid."""
        grids = list(dict.fromkeys(self.grids))
        lengths = [height * width for height, width in grids]
        places = dict(zip(grids, accumulate([0, *lengths]), strict=False))
        return self._on(device, "table_starts", lambda: _integers([places[grid] for grid in self.grids]))

    def _on(self, device: torch.device, name: Any, make: Callable[[], Tensor]) -> Tensor:
        """Return a tensor on a device, to which it is sent once, without waiting for it."""
        if torch.compiler.is_compiling():
            return make().to(device)
        key = name, device
        tensor = self._sent.get(key)
        if tensor is None:
            with torch.inference_mode(False):  # The next call may train.
                tensor = make()
                if device.type == "cuda" and tensor.device.type == "cpu":
                    # Only pinned memory is copied to a GPU without waiting for it.
                    tensor = tensor.pin_memory().to(device, non_blocking=True)
                self._sent[key] = tensor = tensor.to(device)
        return tensor


def _integers(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def by_grid(
    align: Callable[[Tensor, Tensor, Tensor | None, Grid], Tensor],
    visual_tokens: Tensor,
    instruction_tokens: Tensor,
    instruction_mask: Tensor | None,
    packing: Packing,
) -> Tensor:
    """Align entries of the same grid together: ``[M, D], [R, T, Dt], bool [R, T] or None -> [M, D]``."""
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
