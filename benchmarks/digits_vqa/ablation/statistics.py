"""Accuracies and differences with 95 % intervals, by resampling scenes: questions on one scene aren't independent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

RESAMPLES = 5000


@dataclass(frozen=True)
class Estimate:
    """Shares, or differences of shares."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class Clusters:
    """Which scene each question is about, and of which type it is: numbers ``[questions]``."""

    scenes: np.ndarray
    types: np.ndarray

    @classmethod
    def of(cls, scenes: Sequence[int], types: Sequence[str]) -> Clusters:
        return cls(*(np.unique(np.array(given), return_inverse=True)[1] for given in (scenes, types)))


def mean_over_types(values: np.ndarray, clusters: Clusters, resamples: int = RESAMPLES) -> Estimate:
    """The mean, over question types, of the mean of ``values [questions]`` over the questions of a type.

    The values are shares of the runs that were right, or paired differences of two arms; the interval holds the
    2.5th to the 97.5th percentile of the bootstrap over scenes. It tells how far other scenes would move the mean of
    *these* runs.
    """
    shape = (clusters.scenes.max() + 1, clusters.types.max() + 1)
    totals, counts = np.zeros(shape), np.zeros(shape)
    np.add.at(totals, (clusters.scenes, clusters.types), values)
    np.add.at(counts, (clusters.scenes, clusters.types), 1)
    drawn = _drawn(shape[0], resamples)
    resampled = ((drawn @ totals) / np.maximum(drawn @ counts, 1)).mean(axis=1)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Estimate(float((totals.sum(0) / counts.sum(0)).mean()), float(low), float(high))


@cache
def _drawn(scenes: int, resamples: int) -> np.ndarray:
    """How often each scene is drawn, ``[resamples, scenes]``; as floats, whose products are much faster."""
    drawn = np.random.default_rng(0).multinomial(scenes, np.full(scenes, 1 / scenes), size=resamples)
    return drawn.astype(np.float64)
