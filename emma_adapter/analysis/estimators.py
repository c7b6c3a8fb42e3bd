"""Nearest-neighbour estimators of mutual information, in nats. They assume no distribution."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

Samples = NDArray[np.float64]
Labels = NDArray[np.int64]

# The most elements of a distance matrix that are in memory at once.
_BLOCK = 2**22


def ksg(x: Samples, y: Samples, k: int = 3) -> float:
    """Estimate mutual information as Kraskov, Stögbauer and Grassberger do (Phys. Rev. E 69, 066138, 2004, eq. 8).

    Their first estimator is ``psi(k) + psi(n) - <psi(n_x + 1) + psi(n_y + 1)>``, where n_x and n_y count the samples
    nearer in one space than the k-th neighbour is in both, all by the largest coordinate difference.

    Args:
        x: float64 ``[n, dx]``.
        y: float64 ``[n, dy]``, without repeated samples.
        k: number of neighbours; fewer have less bias and more variance.
    """
    n = len(x)
    terms = np.empty(n)
    for rows in _blocks(n):
        in_x, in_y = (_distances(space[rows], space) for space in (x, y))
        itself = (np.arange(len(in_x)), np.arange(n)[rows])
        joint = np.maximum(in_x, in_y)
        joint[itself] = np.inf
        radius = np.partition(joint, k - 1, axis=1)[:, k - 1 : k]
        # The sample itself is among the nearer ones, which makes n_x + 1, except where the radius is 0.
        counts = [np.maximum((space < radius).sum(axis=1), 1) for space in (in_x, in_y)]
        terms[rows] = _digamma(counts[0]) + _digamma(counts[1])
    return float(_digamma(np.array(k)) + _digamma(np.array(n)) - terms.mean())


def ross(x: Samples, labels: Labels, k: int = 3) -> float:
    """Estimate mutual information between samples and labels as Ross does (PLoS ONE 9(2): e87357, 2014).

    It is ``psi(n) + <psi(k)> - <psi(n_label)> - <psi(m)>``, where m counts the samples no farther than the k-th
    neighbour of the same label. Labels with one sample tell nothing and are left out; those with k or fewer use as many
    neighbours as they have.

    Args:
        x: float64 ``[n, dx]``.
        labels: int64 ``[n]``.
        k: number of neighbours.
    """
    sizes = np.bincount(labels)
    repeated = sizes[labels] > 1
    x, labels = x[repeated], labels[repeated]
    n = len(x)
    if n == 0:
        return 0.0
    size = sizes[labels]
    neighbours = np.minimum(k, size - 1)
    m = np.empty(n, dtype=np.int64)
    for rows in _blocks(n):
        distances = _distances(x[rows], x)
        distances[np.arange(len(distances)), np.arange(n)[rows]] = np.inf
        same = np.where(labels[rows][:, None] == labels, distances, np.inf)
        same.partition(range(min(k, n)), axis=1)
        radius = same[np.arange(len(same)), neighbours[rows] - 1]
        m[rows] = (distances <= radius[:, None]).sum(axis=1)
    return float(_digamma(np.array(n)) + _digamma(neighbours).mean() - _digamma(size).mean() - _digamma(m).mean())


def _distances(x: Samples, y: Samples) -> Samples:
    """Return the largest coordinate differences, ``[m, d], [n, d] -> [m, n]``."""
    distances = np.abs(x[:, :1] - y[:, 0])
    for column in range(1, y.shape[1]):
        np.maximum(distances, np.abs(x[:, column, None] - y[:, column]), out=distances)
    return distances


def _blocks(n: int) -> list[slice]:
    step = max(1, _BLOCK // max(n, 1))
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def _digamma(values: NDArray[np.int64]) -> Samples:
    return torch.digamma(torch.as_tensor(values, dtype=torch.float64)).numpy()
