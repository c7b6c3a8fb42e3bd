"""What families have in common whose images are of any size."""

from __future__ import annotations

from torch import nn

from emma_adapter import ModelFamily

#: There is no native size; learned positions live on this grid and are resampled to each image's own.
GRID = (24, 24)


class AnySizeFamily(ModelFamily):
    """A family whose vision tower gives each image its own number of tokens."""

    def visual_size(self, inner: nn.Module) -> tuple[int | None, tuple[int, int] | None]:
        return GRID[0] * GRID[1], GRID

    def has_fixed_size(self, inner: nn.Module) -> bool:
        return False
