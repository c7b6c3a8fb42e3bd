"""Scenes: a 2x2 grid of real handwritten digits, each in one of four colours, at most one cell empty."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = ("red", "green", "blue", "yellow")
POSITIONS = ("top left", "top right", "bottom left", "bottom right")

GRID = 2
CELL = 16
CELLS = GRID * GRID
IMAGE_SIZE = GRID * CELL
EMPTY = -1

# Rows of load_digits: no scan is shared between the splits.
SPLITS = {"train": (0, 1100), "validation": (1100, 1400), "test": (1400, 1797)}

_RGB = np.array([[1.0, 0.15, 0.15], [0.15, 0.9, 0.2], [0.25, 0.4, 1.0], [1.0, 0.95, 0.15]], dtype=np.float32)
_GLYPH = 14
_NOISE = 0.05


@dataclass(frozen=True)
class Scenes:
    """``n`` scenes as arrays; ``EMPTY`` marks an empty cell. Cells are in reading order.

    The handwriting, the placement and the light of a scene are fields of their own, so that
    two scenes can differ in one attribute and nothing else.
    """

    digits: np.ndarray  # [n, CELLS] 0-9 or EMPTY
    colours: np.ndarray  # [n, CELLS] index into COLOURS or EMPTY
    scans: np.ndarray  # [n, CELLS] row of load_digits
    shifts: np.ndarray  # [n, CELLS, 2] pixels
    gains: np.ndarray  # [n, CELLS] brightness of the ink
    backgrounds: np.ndarray  # [n, 3] RGB
    noise_seeds: np.ndarray  # [n]

    def __len__(self) -> int:
        return len(self.digits)

    def with_attributes(self, digits: np.ndarray, colours: np.ndarray, scans: np.ndarray) -> Scenes:
        return replace(self, digits=digits, colours=colours, scans=scans)


@cache
def _glyphs() -> torch.Tensor:
    scans = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16
    return F.interpolate(scans, size=(_GLYPH, _GLYPH), mode="bilinear", align_corners=False)[:, 0]


@cache
def _scans_by_digit(split: str) -> tuple[np.ndarray, ...]:
    first, last = SPLITS[split]
    labels = load_digits().target[first:last]
    return tuple(np.flatnonzero(labels == digit) + first for digit in range(10))


def pick_scans(digits: np.ndarray, split: str, rng: np.random.Generator) -> np.ndarray:
    """One random scan of the right digit for every cell, from ``split`` only."""
    draw = rng.random(digits.shape)
    scans = np.zeros_like(digits)
    for digit, pool in enumerate(_scans_by_digit(split)):
        here = digits == digit
        scans[here] = pool[(draw[here] * len(pool)).astype(int)]
    return scans


def sample_scenes(n: int, split: str, rng: np.random.Generator, share_with_empty_cell: float = 0.32) -> Scenes:
    digits = rng.integers(0, 10, (n, CELLS))
    colours = rng.integers(0, len(COLOURS), (n, CELLS))
    with_empty = np.flatnonzero(rng.random(n) < share_with_empty_cell)
    empty_cell = rng.integers(0, CELLS, len(with_empty))
    digits[with_empty, empty_cell] = EMPTY
    colours[with_empty, empty_cell] = EMPTY
    return Scenes(
        digits=digits,
        colours=colours,
        scans=pick_scans(digits, split, rng),
        shifts=rng.integers(0, CELL - _GLYPH + 1, (n, CELLS, 2)),
        gains=rng.uniform(0.75, 1.0, (n, CELLS)).astype(np.float32),
        backgrounds=(rng.random((n, 3)) * 0.25).astype(np.float32),
        noise_seeds=rng.integers(0, 2**31, n),
    )


def render(scenes: Scenes) -> np.ndarray:
    """Pictures ``[n, IMAGE_SIZE, IMAGE_SIZE, 3]``, uint8 RGB."""
    n = len(scenes)
    glyphs = _glyphs()[torch.as_tensor(scenes.scans).reshape(-1)].numpy()
    ink = np.zeros((n * CELLS, CELL, CELL), dtype=np.float32)
    shifts = scenes.shifts.reshape(-1, 2)
    for dy in range(CELL - _GLYPH + 1):
        for dx in range(CELL - _GLYPH + 1):
            here = (shifts[:, 0] == dy) & (shifts[:, 1] == dx)
            ink[here, dy : dy + _GLYPH, dx : dx + _GLYPH] = glyphs[here]
    ink *= (scenes.digits.reshape(-1) != EMPTY)[:, None, None] * scenes.gains.reshape(-1)[:, None, None]
    alpha = ink.reshape(n, GRID, GRID, CELL, CELL).transpose(0, 1, 3, 2, 4).reshape(n, IMAGE_SIZE, IMAGE_SIZE, 1)
    rgb = _RGB[np.clip(scenes.colours, 0, None)].reshape(n, GRID, GRID, 3)
    rgb = rgb.repeat(CELL, axis=1).repeat(CELL, axis=2)
    picture: np.ndarray = alpha * rgb + (1 - alpha) * scenes.backgrounds[:, None, None, :]
    for i, seed in enumerate(scenes.noise_seeds):
        picture[i] += _NOISE * np.random.default_rng(seed).standard_normal(picture[i].shape, dtype=np.float32)
    return np.rint(picture.clip(0, 1) * 255).astype(np.uint8)
