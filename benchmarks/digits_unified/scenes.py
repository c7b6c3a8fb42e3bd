"""Scenes: a grid of real handwritten digits in four colours on one ground, 32 pixels a cell, cells in reading order."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from ..digits_vqa.scenes import COLOURS, DIGITS, EMPTY, pick_scans

CELL = 32
GRIDS = (2, 3)
ROWS = {2: ("top", "bottom"), 3: ("top", "middle", "bottom")}
COLUMNS = {2: ("left", "right"), 3: ("left", "centre", "right")}

#: Combinations of digit and colour that nothing but the judge is trained on.
HELD_OUT = {("two", "green"), ("four", "yellow"), ("seven", "red"), ("nine", "blue")}
#: ``[10, 4]``: which combinations are in training scenes.
SEEN = np.array([[(digit, colour) not in HELD_OUT for colour in COLOURS] for digit in DIGITS])

Combinations = Literal["seen", "held out", "all"]
Hand = Literal["natural", "varied"]

_RGB = torch.tensor([[1.0, 0.15, 0.15], [0.15, 0.9, 0.2], [0.25, 0.4, 1.0], [1.0, 0.95, 0.15]])
_GLYPH = 40
# Of a cell's digit: shift right and down in half cells, rotation in radians, shear, width and height as shares of the
# cell, and the ink level at which a stroke begins (a low one makes thick strokes).
_HAND = {
    "natural": ((-0.1, -0.1, -0.08, -0.08, 0.88, 0.88, 0.2), (0.1, 0.1, 0.08, 0.08, 1.05, 1.05, 0.3)),
    "varied": ((-0.2, -0.2, -0.25, -0.25, 0.75, 0.75, 0.1), (0.2, 0.2, 0.25, 0.25, 1.12, 1.12, 0.4)),
}


@dataclass(frozen=True)
class Scenes:
    """``n`` scenes as arrays; ``EMPTY`` marks an empty cell. What is written, by which hand and on which ground are
    fields of their own, so that two scenes can differ in one cell and nothing else."""

    digits: np.ndarray  # [n, cells] 0-9 or EMPTY
    colours: np.ndarray  # [n, cells] index into COLOURS or EMPTY
    scans: np.ndarray  # [n, cells] row of load_digits
    hands: np.ndarray  # [n, cells, 7] see _HAND
    inks: np.ndarray  # [n, cells] brightness
    grounds: np.ndarray  # [n, 3] RGB

    def __len__(self) -> int:
        return len(self.digits)

    @property
    def grid(self) -> int:
        return round(self.digits.shape[1] ** 0.5)

    def __getitem__(self, rows: slice | np.ndarray) -> Scenes:
        return Scenes(*(getattr(self, field.name)[rows] for field in fields(self)))


@cache
def _glyphs() -> Tensor:
    scans = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16
    return F.interpolate(F.pad(scans, (1, 1, 1, 1)), size=(_GLYPH, _GLYPH), mode="bicubic", align_corners=False)


def sample_scenes(
    n: int,
    split: str,
    rng: np.random.Generator,
    *,
    grid: int = 2,
    combinations: Combinations = "seen",
    hand: Hand = "natural",
) -> Scenes:
    """Half of the scenes have one or more empty cells, at most half of all.

    ``combinations``: with "held out", every scene has one of them. ``hand``: "varied" is augmentation.
    """
    cells = grid * grid
    allowed = np.argwhere(SEEN | (combinations == "all"))
    digits, colours = np.moveaxis(allowed[rng.integers(0, len(allowed), (n, cells))], -1, 0).copy()
    holes = np.where(rng.random(n) < 0.5, 0, rng.integers(1, cells // 2 + 1, n))
    order = rng.random((n, cells)).argsort(1)
    if combinations == "held out":
        digits[np.arange(n), order[:, -1]], colours[np.arange(n), order[:, -1]] = np.argwhere(~SEEN)[
            rng.integers(0, (~SEEN).sum(), n)
        ].T
    ranks = order.argsort(1)
    empty = ranks < holes[:, None]
    digits[empty] = colours[empty] = EMPTY
    low, high = (np.array(bounds) for bounds in _HAND[hand])
    return Scenes(
        digits=digits,
        colours=colours,
        scans=pick_scans(digits, split, rng),
        hands=rng.uniform(low, high, (n, cells, len(low))).astype(np.float32),
        inks=rng.uniform(0.8, 1, (n, cells)).astype(np.float32),
        grounds=rng.uniform(0, 0.25, (n, 3)).astype(np.float32),
    )


def render(scenes: Scenes) -> Tensor:
    """Pictures ``[n, 3, H, W]`` in [0, 1], float32, in steps of 1/255: what a PNG of them holds."""
    n, cells = scenes.digits.shape
    right, down, angle, shear, width, height, threshold = torch.as_tensor(scenes.hands.reshape(-1, 7)).T
    # A point of the cell comes from: shift back, rotate back, shear, scale back.
    cos, sin = angle.cos(), angle.sin()
    rows = torch.stack(
        [
            torch.stack([(cos + shear * sin) / width, (shear * cos - sin) / width], -1),
            torch.stack([sin / height, cos / height], -1),
        ],
        1,
    )
    shift = -(rows @ torch.stack([right, down], -1)[..., None])
    grid = F.affine_grid(torch.cat([rows, shift], -1), [n * cells, 1, CELL, CELL], align_corners=False)
    ink = F.grid_sample(_glyphs()[torch.as_tensor(scenes.scans.reshape(-1))], grid, align_corners=False)
    ink = ((ink - threshold[:, None, None, None]) * 2).clamp(0, 1)
    ink = ink * torch.as_tensor((scenes.digits != EMPTY) * scenes.inks).reshape(-1, 1, 1, 1)
    rgb = _RGB[torch.as_tensor(scenes.colours.reshape(-1)).clamp(min=0)][:, :, None, None]
    ground = torch.as_tensor(scenes.grounds).repeat_interleave(cells, 0)[:, :, None, None]
    return from_cells(((ink * rgb + (1 - ink) * ground) * 255).round() / 255, scenes.grid)


def to_cells(pictures: Tensor) -> Tensor:
    """``[n, 3, H, W]`` to ``[n, cells, 3, CELL, CELL]``."""
    n, _, height, width = pictures.shape
    split = pictures.reshape(n, 3, height // CELL, CELL, width // CELL, CELL).permute(0, 2, 4, 1, 3, 5)
    return split.reshape(n, -1, 3, CELL, CELL)


def from_cells(cells: Tensor, grid: int) -> Tensor:
    """``[n * cells, 3, CELL, CELL]`` to ``[n, 3, H, W]``."""
    split = cells.reshape(-1, grid, grid, 3, CELL, CELL).permute(0, 3, 1, 4, 2, 5)
    return split.reshape(-1, 3, grid * CELL, grid * CELL)


def with_cells(scenes: Scenes, **changes: np.ndarray) -> Scenes:
    """The scenes with other ``digits``, ``colours``, ``scans``, ``hands`` or ``inks``."""
    return replace(scenes, **changes)
