"""Scenes: a 3x3 grid of things that were photographed, some cells empty, each on a tinted photograph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from ..digits_vqa.scenes import COLOURS
from .stamps import KINDS, Stamp

KIND_NAMES = tuple(KINDS)
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
POSITIONS = tuple(f"{row} {column}" for row in ROWS for column in COLUMNS)

GRID = 3
CELL = 96
CELLS = GRID * GRID
IMAGE_SIZE = GRID * CELL
EMPTY = -1

#: Fewer than there are kinds, so that one is always missing.
_THINGS = (4, 7)
_SIZES = (62, 92)
_LIGHTS = (0.7, 1.15)
_RGB = np.array([[0.8, 0.3, 0.28], [0.3, 0.65, 0.3], [0.3, 0.45, 0.85], [0.85, 0.75, 0.25]], dtype=np.float32)
#: How much of a ground is its colour; the rest is the photograph's brightness times it.
_PLAIN = 0.45


@dataclass(frozen=True)
class Scenes:
    """``n`` scenes as arrays; cells are in reading order.

    What a cell shows and how it shows it are fields of their own, so that two scenes can differ in one cell alone, and
    so that questions can be asked without the photographs.
    """

    kinds: np.ndarray  # [n, CELLS] index into KIND_NAMES, or EMPTY
    grounds: np.ndarray  # [n, CELLS] index into COLOURS, of empty cells too
    photographs: np.ndarray  # [n, CELLS] which one of its kind, as a share of those there are
    sizes: np.ndarray  # [n, CELLS] longer side in pixels
    shifts: np.ndarray  # [n, CELLS, 2] down and right, as shares of the room there is
    mirrored: np.ndarray  # [n, CELLS] bool
    lights: np.ndarray  # [n, CELLS] brightness of the thing
    crops: np.ndarray  # [n, CELLS, 2] of the ground's photograph, as shares of the room there is

    def __len__(self) -> int:
        return len(self.kinds)

    def with_attributes(self, kinds: np.ndarray, grounds: np.ndarray) -> Scenes:
        return replace(self, kinds=kinds, grounds=grounds)


def sample_scenes(n: int, rng: np.random.Generator) -> Scenes:
    kinds = rng.integers(0, len(KIND_NAMES), (n, CELLS))
    things = rng.integers(_THINGS[0], _THINGS[1] + 1, n)
    kinds[rng.random((n, CELLS)).argsort(1).argsort(1) >= things[:, None]] = EMPTY
    return Scenes(
        kinds=kinds,
        grounds=rng.integers(0, len(COLOURS), (n, CELLS)),
        photographs=rng.random((n, CELLS)),
        sizes=rng.integers(_SIZES[0], _SIZES[1] + 1, (n, CELLS)),
        shifts=rng.random((n, CELLS, 2)),
        mirrored=rng.random((n, CELLS)) < 0.5,
        lights=rng.uniform(*_LIGHTS, (n, CELLS)),
        crops=rng.random((n, CELLS, 2)),
    )


def render(scenes: Scenes, stamps: Sequence[Stamp], split: str) -> np.ndarray:
    """Pictures ``[n, IMAGE_SIZE, IMAGE_SIZE, 3]``, uint8 RGB, of the photographs in ``split`` alone."""
    pools = [[stamp for stamp in stamps if (stamp.kind, stamp.split) == (kind, split)] for kind in range(len(KINDS))]
    pictures = np.zeros((len(scenes), IMAGE_SIZE, IMAGE_SIZE, 3), np.float32)
    for scene in range(len(scenes)):
        for cell in range(CELLS):
            top, left = (CELL * place for place in divmod(cell, GRID))
            view = pictures[scene, top : top + CELL, left : left + CELL]
            view[:] = _ground(scenes.grounds[scene, cell], scenes.crops[scene, cell])
            kind = scenes.kinds[scene, cell]
            if kind != EMPTY:
                photograph = pools[kind][int(scenes.photographs[scene, cell] * len(pools[kind]))]
                _paste(view, photograph, scenes, (scene, cell))
    return np.rint(pictures.clip(0, 1) * 255).astype(np.uint8)


@cache
def _photographs() -> tuple[np.ndarray, ...]:
    """Brightness ``[H, W]`` of scikit-learn's sample photographs, from 0 to 1."""
    return tuple(image.mean(-1).astype(np.float32) / 255 for image in load_sample_images().images)


def _ground(colour: int, crop: np.ndarray) -> np.ndarray:
    """``[CELL, CELL, 3]``"""
    photographs = _photographs()
    # The crop's place also tells which of the photographs it is of.
    number, right = divmod(crop[1] * len(photographs), 1)
    photograph = photographs[int(number)]
    height, width = photograph.shape
    top, left = int(crop[0] * (height - CELL)), int(right * (width - CELL))
    brightness = photograph[top : top + CELL, left : left + CELL, None]
    tinted: np.ndarray = (_PLAIN + (1 - _PLAIN) * brightness) * _RGB[colour]
    return tinted


def _paste(view: np.ndarray, stamp: Stamp, scenes: Scenes, at: tuple[int, int]) -> None:
    height, width = stamp.pixels.shape[:2]
    scale = scenes.sizes[at] / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    # Premultiplied colours: else those of transparent pixels would show at its edge.
    image = Image.fromarray(stamp.pixels).convert("RGBa").resize(size, Image.Resampling.BICUBIC)
    thing = np.asarray(image, np.float32) / 255
    if scenes.mirrored[at]:
        thing = thing[:, ::-1]
    top, left = (int(share * (CELL - side)) for share, side in zip(scenes.shifts[at], thing.shape, strict=False))
    under = view[top : top + thing.shape[0], left : left + thing.shape[1]]
    under[:] = thing[..., :3] * scenes.lights[at] + (1 - thing[..., 3:]) * under
