"""Distances between near-identical images, which the vision encoder hardly tells apart, before and after alignment."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import AnalysisError
from .observing import Model, VisualEntry, observe


@dataclass(frozen=True, eq=False)
class PairDistances:
    """Distances between the representations of the two images of each pair, float64 ``[P]``.

    A distance is ``|A - B| / sqrt((|A|^2 + |B|^2) / 2)`` over all visual tokens of the images, so that it doesn't
    change if all tokens become longer. It is 0 for equal images and at most 2.
    """

    before: NDArray[np.float64]
    after: NDArray[np.float64]

    @property
    def ratio(self) -> NDArray[np.float64]:
        """``after / before``: above 1 where alignment pulls a pair apart; NaN where both distances are 0."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.after / self.before


def pair_distances(model: Model, pairs: Iterable[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> PairDistances:
    """Measure how far apart the representations of near-identical images are, before and after alignment.

    The paper measures this on MMVP, whose pairs CLIP sees as almost the same (arXiv 2410.02080, analysis of the
    alignment; Tong et al. 2024, arXiv 2401.06209).

    Args:
        model: a patched model, or its handle.
        pairs: of batches, as the processor returns them: row i of the first batch shows one image of a pair, row i of
            the second batch the other, each with its question.

    Raises:
        PatchError: if the model is not patched.
        AnalysisError: if there is no pair, or the two batches don't show images of the same sizes.
    """
    before: list[float] = []
    after: list[float] = []
    for number, pair in enumerate(pairs):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise AnalysisError(f"pairs must hold two batches each, (first, second); number {number} doesn't")
        first, second = (_by_row(observe(model, batch)) for batch in pair)
        shapes = [
            {row: [entry.before.shape for entry in entries] for row, entries in rows.items()}
            for rows in (first, second)
        ]
        if shapes[0] != shapes[1]:
            raise AnalysisError(
                f"the images of pair {number} have other numbers of visual tokens, or lie in other rows: resize both "
                "to one size, and keep the order of the rows"
            )
        for row in sorted(first):
            for distances, name in ((before, "before"), (after, "after")):
                a, b = (torch.cat([getattr(entry, name) for entry in rows[row]]) for rows in (first, second))
                distances.append(_distance(a, b))
    if not before:
        raise AnalysisError("there is no pair to measure: an iterator that was read before is empty")
    return PairDistances(np.array(before), np.array(after))


def _by_row(entries: list[VisualEntry]) -> dict[int, list[VisualEntry]]:
    rows: dict[int, list[VisualEntry]] = {}
    for entry in entries:
        rows.setdefault(entry.row, []).append(entry)
    return rows


def _distance(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    length = ((a.square().sum() + b.square().sum()) / 2).sqrt()
    return float((a - b).norm() / length) if length > 0 else 0.0
