"""Calibration of the estimators on samples whose mutual information is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .estimators import Labels, Samples, ksg, ross

#: In nats. Above the last, an estimate only tells that there is more.
_LEVELS = (0.0, 0.2, 0.5, 1.0, 1.75, 2.75, 4.0, 6.0)
#: Distances of the classes' centres from the origin, in standard deviations of a class.
_DISTANCES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.5, 7.0, 11.0)
_REPLICATES = 4
# Where the estimate grows by less than a tenth of the truth's growth, it is mostly noise. Below the limit, in nats,
# levels lie too close together to tell.
_MIN_SLOPE, _MIN_LIMIT, _MIN_GROWTH = 0.1, 0.4, 0.05
_DENSITY_SAMPLES = 2000


@dataclass(frozen=True, eq=False)
class Calibration:
    """At each level, the true information, and the mean and standard deviation of its estimates; all ``[levels]``."""

    truth: Samples
    mean: Samples
    spread: Samples

    def correct(self, raw: float) -> tuple[float, float, float]:
        """Return the information that gives this estimate on average, the correction's slope, and the spread there."""
        last = self._last_resolved + 1
        truth = self.truth[:last]
        # Estimates fluctuate, and interpolation needs means that grow with the truth.
        mean = np.maximum.accumulate(self.mean[:last]) + np.arange(last) * 1e-9
        corrected = float(np.interp(raw, mean, truth))
        # The slope over a few levels fluctuates less than that over one.
        step = int(np.clip(np.searchsorted(mean, raw), 1, last - 1))
        low, high = max(step - 2, 0), min(step + 1, last - 1)
        slope = (truth[high] - truth[low]) / max(mean[high] - mean[low], 1e-9)
        spread = float(np.interp(raw, mean, np.sqrt(_smooth(self.spread**2))[:last]))
        return corrected, float(np.clip(slope, 1.0, 1 / _MIN_SLOPE)), spread

    def is_saturated(self, raw: float) -> bool:
        """Return whether an estimate is about as high as the estimator gets, so that the truth may be higher."""
        level = self._last_resolved
        may_be_more = level < len(self.truth) - 1 or self.truth[-1] >= _LEVELS[-1]
        return bool(may_be_more and raw >= self.mean[level] - self.spread[level])

    @property
    def _last_resolved(self) -> int:
        """The last level that estimates distinguish from the one before."""
        for level, (rise, growth) in enumerate(zip(np.diff(self.mean), np.diff(self.truth), strict=True)):
            # With labels, the truth itself stops growing, at their entropy.
            if self.truth[level] >= _MIN_LIMIT and growth > _MIN_GROWTH and rise < _MIN_SLOPE * growth:
                return level
        return len(self.truth) - 1


def calibrate_gaussians(n: int, dims: tuple[int, int], shares: Samples, k: int, seed: int) -> Calibration:
    """Calibrate :func:`ksg` on Gaussians of ``n`` samples and these dimensions.

    Args:
        n: number of samples.
        dims: of x and of y.
        shares: ``[min(dims)]``, how the information divides over the pairs of canonical variables. A pair with
            correlation rho has ``-log(1 - rho^2) / 2`` (Cover and Thomas, Elements of Information Theory, 2006, 8.5).
        k: number of neighbours.
        seed: of the samples.
    """

    def draw(level: float, replicate: int) -> tuple[Samples, Samples]:
        # The same noise at all levels, so that they differ only in the level.
        rng = np.random.default_rng((seed, replicate))
        rho = np.sqrt(-np.expm1(-2 * level * shares))
        x, y = rng.standard_normal((n, dims[0])), rng.standard_normal((n, dims[1]))
        pairs = len(shares)
        y[:, :pairs] = rho * x[:, :pairs] + np.sqrt(1 - rho**2) * y[:, :pairs]
        # The largest coordinate difference depends on the direction.
        return x @ _rotation(dims[0], rng), y @ _rotation(dims[1], rng)

    estimates = np.array([[ksg(*draw(level, number), k) for number in range(_REPLICATES)] for level in _LEVELS])
    return Calibration(np.array(_LEVELS), estimates.mean(1), estimates.std(1, ddof=1))


def calibrate_classes(
    x: Samples, labels: Labels, k: int, seed: int, prepare: Callable[[Samples], Samples] = lambda x: x
) -> Calibration:
    """Calibrate :func:`ross` on Gaussian classes with these labels.

    Their centres lie as those of ``x [n, d]`` but for the scale, and their samples are prepared as the data were. The
    truth at each level is a mean over the exact densities.
    """
    sizes = np.bincount(labels)
    prior = sizes / sizes.sum()
    dims = x.shape[1]
    directions = np.stack([x[labels == label].mean(0) for label in range(len(sizes))]) - x.mean(0)
    # Of length 1 on average; if the labels differ in nothing, the directions are arbitrary.
    directions /= max(float(np.sqrt((directions**2).sum(1).mean())), 1e-12)
    truth = np.empty((len(_DISTANCES), _REPLICATES))
    estimates = np.empty_like(truth)
    for replicate in range(_REPLICATES):
        # The same noise at all distances, so that they differ only in the distance.
        rng = np.random.default_rng((seed, replicate))
        noise = rng.standard_normal((len(labels), dims))
        drawn_labels = rng.choice(len(sizes), size=_DENSITY_SAMPLES, p=prior)
        further_noise = rng.standard_normal((_DENSITY_SAMPLES, dims))
        for level, distance in enumerate(_DISTANCES):
            centres = distance * directions
            estimates[level, replicate] = ross(prepare(centres[labels] + noise), labels, k)
            truth[level, replicate] = _information_of_classes(
                centres, prior, drawn_labels, centres[drawn_labels] + further_noise
            )
    return Calibration(np.maximum.accumulate(truth.mean(1)), estimates.mean(1), (estimates - truth).std(1, ddof=1))


def _information_of_classes(centres: Samples, prior: Samples, labels: Labels, points: Samples) -> float:
    """Return the mean of ``log p(point | its class) - log p(point)``, with unit variance around each centre."""
    log_density = -0.5 * ((points[:, None] - centres) ** 2).sum(-1)
    largest = log_density.max(1, keepdims=True)
    marginal = np.log((prior * np.exp(log_density - largest)).sum(1)) + largest[:, 0]
    return float((log_density[np.arange(len(points)), labels] - marginal).mean())


def canonical_shares(x: Samples, y: Samples) -> Samples:
    """Return the share of each pair of canonical variables in the information of ``x [n, dx]`` and ``y [n, dy]``.

    ``[min(dx, dy)]``, from the linear part of the information; equal shares if there is none.
    """
    n, dx = x.shape
    dy = y.shape[1]
    x_basis, y_basis = (np.linalg.svd(z - z.mean(0), full_matrices=False)[0] for z in (x, y))
    squared = np.linalg.svd(x_basis.T @ y_basis, compute_uv=False)[: min(dx, dy)] ** 2
    # Less what independent samples have on average (Wherry, 1931).
    squared = 1 - (1 - squared) * (n - 1) / max(1, n - 1 - max(dx, dy))
    information = -np.log1p(-np.clip(squared, 0, 1 - 1e-9))
    total = information.sum()
    return information / total if total > 1e-9 else np.full(len(information), 1 / len(information))


def _rotation(dims: int, rng: np.random.Generator) -> Samples:
    q, r = np.linalg.qr(rng.standard_normal((dims, dims)))
    return q * np.sign(np.diagonal(r))


def _smooth(values: Samples) -> Samples:
    """Return means over neighbouring levels: a variance of four replicates is itself uncertain."""
    padded = np.concatenate([values[:1], values, values[-1:]])
    return (padded[:-2] + padded[1:-1] + padded[2:]) / 3
