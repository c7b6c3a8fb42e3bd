"""Who reads drawn pictures: a small convolutional network that sees one cell at a time and knows none of the models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..digits_vqa.scenes import COLOURS, DIGITS, EMPTY
from .captions import EDITS, Edits
from .scenes import Scenes, to_cells

JUDGE_DIR = Path(__file__).parent / "judge"
_NO_DIGIT = len(DIGITS)


@dataclass(frozen=True)
class Reading:
    """What was read of ``n`` pictures, as in ``Scenes``."""

    digits: np.ndarray  # [n, cells]
    colours: np.ndarray  # [n, cells]


class Judge(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 24, 3, 1, 1),
            nn.GELU(),
            nn.Conv2d(24, 32, 3, 2, 1),
            nn.GELU(),
            nn.Conv2d(32, 48, 3, 2, 1),
            nn.GELU(),
            nn.Conv2d(48, 64, 3, 2, 1),
            nn.GELU(),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(64 * 16, 96),
            nn.GELU(),
            nn.Dropout(0.2),
            nn.Linear(96, _NO_DIGIT + 1 + len(COLOURS)),
        )

    def forward(self, cells: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of digit (the last: none) and colour of cells ``[n, 3, CELL, CELL]`` in [0, 1]."""
        digit, colour = self.net((cells - 0.2) / 0.3).split([_NO_DIGIT + 1, len(COLOURS)], -1)
        return digit, colour

    @torch.no_grad()
    def read(self, pictures: Tensor) -> Reading:
        """Read pictures ``[n, 3, H, W]`` in [0, 1]."""
        cells = to_cells(pictures)
        found = [self(part) for part in cells.flatten(0, 1).split(512)]
        digits = torch.cat([digit for digit, _ in found]).argmax(-1)
        colours = torch.cat([colour for _, colour in found]).argmax(-1)
        empty = digits == _NO_DIGIT
        shape = cells.shape[:2]
        return Reading(
            digits.masked_fill(empty, EMPTY).view(shape).numpy(), colours.masked_fill(empty, EMPTY).view(shape).numpy()
        )


def labels(scenes: Scenes) -> tuple[Tensor, Tensor]:
    """Of each cell ``[n * cells]``: the index of its digit's logit, and its colour (``EMPTY`` where it has none)."""
    digits, colours = (torch.as_tensor(field.reshape(-1)) for field in (scenes.digits, scenes.colours))
    return digits.masked_fill(digits == EMPTY, _NO_DIGIT), colours


def load_judge(folder: Path = JUDGE_DIR) -> Judge:
    judge = Judge()
    judge.load_state_dict({name: weight.float() for name, weight in load_file(folder / "model.safetensors").items()})
    return judge.eval().requires_grad_(False)


#: Figures of ``n`` pictures: name to ``[n]``, the share that is right in each, NaN where a picture has none such.
Scores = dict[str, np.ndarray]


def score_drawings(read: Reading, wanted: Scenes) -> Scores:
    """After GenEval (arXiv 2310.11513): digit and colour where a digit is wanted, both together at the place
    ("position") and at any ("anywhere"), nothing where nothing is wanted ("empty"), and all cells of a scene."""
    full = wanted.digits != EMPTY
    digit, colour = read.digits == wanted.digits, read.colours == wanted.colours
    both = digit & colour
    anywhere = np.array(
        [_found(read.digits[i], read.colours[i], wanted.digits[i], wanted.colours[i]) for i in range(len(wanted))]
    )
    return {
        "digit": _where(digit, full),
        "colour": _where(colour, full),
        "position": _where(both, full),
        "anywhere": anywhere,
        "empty": _where(digit, ~full),
        "whole scene": both.all(1).astype(float),
        "whole scene, anywhere": np.array(
            [
                sorted(zip(read.digits[i], read.colours[i], strict=True))
                == sorted(zip(wanted.digits[i], wanted.colours[i], strict=True))
                for i in range(len(wanted))
            ],
            dtype=float,
        ),
    }


def score_edits(read: Reading, edits: Edits, pictures: Tensor, ideal: Tensor) -> Scores:
    """Edited cells and the others, by what is read of them; and the others' mean error in steps of 1/255 against
    ``ideal``: the wanted pictures through the autoencoder, whose own error is so left out."""
    both = (read.digits == edits.after.digits) & (read.colours == edits.after.colours)
    edited = np.array([row[changed].all() for row, changed in zip(both, edits.changed, strict=True)])
    error = (to_cells(pictures) - to_cells(ideal)).abs().mean((2, 3, 4)).numpy() * 255
    scores = {
        "edited cell": edited.astype(float),
        "other cells kept": _where(both, ~edits.changed),
        "whole scene": both.all(1).astype(float),
        "pixel error of other cells": _where(error, ~edits.changed),
        "edited, by name": _where(edited, edits.by_name),
        "edited, by place": _where(edited, ~edits.by_name),
    }
    return scores | {f"edited: {kind}": _where(edited, edits.kinds == kind) for kind in EDITS}


def mean(scores: Scores) -> dict[str, float]:
    return {name: float(np.nanmean(values)) for name, values in scores.items() if not np.isnan(values).all()}


def listed(scores: Scores) -> dict[str, list[float | None]]:
    """As JSON holds them."""
    return {
        name: [None if np.isnan(value) else round(float(value), 4) for value in values]
        for name, values in scores.items()
    }


def _where(values: np.ndarray, there: np.ndarray) -> np.ndarray:
    """The mean over the cells that are there, of each picture."""
    values, there = (array.reshape(len(array), -1) for array in (values, there))
    count = there.sum(1)
    total = (values * there).sum(1)
    return np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0)


def _found(digits: np.ndarray, colours: np.ndarray, wanted_digits: np.ndarray, wanted_colours: np.ndarray) -> float:
    """The share of the wanted digits that are somewhere, each as often as it is wanted."""
    there = list(zip(digits, colours, strict=True))
    wanted = [one for one in zip(wanted_digits, wanted_colours, strict=True) if one[0] != EMPTY]
    hits = 0
    for one in wanted:
        if one in there:
            there.remove(one)
            hits += 1
    return hits / len(wanted)
