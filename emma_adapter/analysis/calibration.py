"""How far the estimators are off, on samples whose mutual information is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .estimators import Labels, Samples, ksg, ross

#: In nats; what lies above the last is only known to be more.
_LEVELS = (0.0, 0.1, 0.25, 0.5, 1.0, 1.75, 2.75, 4.0, 6.0)
#: Distances of the classes' centres from the origin, in standard deviations of a class.
_DISTANCES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.5, 7.0, 11.0)
_REPLICATES = 4
# Where the estimate grows by less than a tenth of what the truth does, it is mostly noise. Below the limit, in nats,
# levels lie too close together to tell.
_MIN_SLOPE, _MIN_LIMIT = 0.1, 0.4
_DENSITY_SAMPLES = 2000

Estimate = Callable[[Samples, NDArray[np.generic]], float]


@dataclass(frozen=True, eq=False)
class Calibration:
    """At each level, what is true, and the mean and standard deviation of what is estimated; all ``[levels]``."""

    truth: Samples
    mean: Samples
    spread: Samples

    def correct(self, raw: float) -> tuple[float, float, float]:
        """For an estimate: the information that gives it on average, the slope there, and the spread there."""
        last = self._last_resolved + 1
        # Estimates fluctuate around 0: that the means grow with the truth is enforced.
        mean = np.maximum.accumulate(self.mean[:last]) + np.arange(last) * 1e-9
        corrected = float(np.interp(raw, mean, self.truth[:last]))
        step = int(np.clip(np.searchsorted(mean, raw), 1, last - 1))
        rise = mean[step] - mean[step - 1]
        slope = (self.truth[step] - self.truth[step - 1]) / rise if rise > 1e-6 else 1.0
        spread = float(np.interp(raw, mean, np.sqrt(_smooth(self.spread**2))[:last]))
        return corrected, float(np.clip(slope, 1.0, 1 / _MIN_SLOPE)), spread

    def is_saturated(self, raw: float) -> bool:
        """Whether an estimate is as high as the estimator gets."""
        return bool(raw >= self.mean[self._last_resolved] - self.spread[self._last_resolved])

    @property
    def _last_resolved(self) -> int:
        """The last level that estimates tell from the one before."""
        rises = np.diff(self.mean) / np.maximum(np.diff(self.truth), 1e-9)
        flat = [level for level, rise in enumerate(rises) if rise < _MIN_SLOPE and self.truth[level] >= _MIN_LIMIT]
        return flat[0] if flat else len(self.truth) - 1


def calibrate_gaussians(n: int, dims: tuple[int, int], shares: Samples, k: int, seed: int) -> Calibration:
    """The bias of :func:`ksg` on Gaussians of ``n`` samples and these dimensions.

    Args:
        n: samples.
        dims: of x and of y.
        shares: ``[min(dims)]``, how the information divides over the pairs of canonical variables. Of a pair with
            correlation rho it is ``-log(1 - rho^2) / 2`` (Cover and Thomas, Elements of Information Theory, 2006, 8.5).
        k: neighbours.
        seed: of the samples.
    """
    rng = np.random.default_rng(seed)

    def draw(level: float) -> tuple[Samples, Samples]:
        rho = np.sqrt(-np.expm1(-2 * level * shares))
        x, y = rng.standard_normal((n, dims[0])), rng.standard_normal((n, dims[1]))
        pairs = len(shares)
        y[:, :pairs] = rho * x[:, :pairs] + np.sqrt(1 - rho**2) * y[:, :pairs]
        # The largest coordinate difference isn't the same along all directions.
        return x @ _rotation(dims[0], rng), y @ _rotation(dims[1], rng)

    estimates = np.array([[ksg(*draw(level), k) for _ in range(_REPLICATES)] for level in _LEVELS])
    return Calibration(np.array(_LEVELS), estimates.mean(1), estimates.std(1, ddof=1))


def calibrate_classes(labels: Labels, dims: int, k: int, seed: int) -> Calibration:
    """The bias of :func:`ross` on Gaussian classes with these labels, whose centres lie in random directions.

    The truth at each level is a mean over the exact densities.
    """
    rng = np.random.default_rng(seed)
    sizes = np.bincount(labels)
    prior = sizes / sizes.sum()
    truth, estimates = [], []
    for distance in _DISTANCES:
        truths, found = [], []
        for _ in range(_REPLICATES):
            centres = rng.standard_normal((len(sizes), dims))
            centres *= distance / np.linalg.norm(centres, axis=1, keepdims=True)
            found.append(ross(centres[labels] + rng.standard_normal((len(labels), dims)), labels, k))
            drawn = rng.choice(len(sizes), size=_DENSITY_SAMPLES, p=prior)
            x = centres[drawn] + rng.standard_normal((_DENSITY_SAMPLES, dims))
            log_density = -0.5 * ((x[:, None] - centres) ** 2).sum(-1)
            largest = log_density.max(1, keepdims=True)
            marginal = np.log((prior * np.exp(log_density - largest)).sum(1)) + largest[:, 0]
            truths.append((log_density[np.arange(_DENSITY_SAMPLES), drawn] - marginal).mean())
        truth.append(np.mean(truths))
        estimates.append(found)
    estimates_ = np.array(estimates)
    return Calibration(np.maximum.accumulate(truth), estimates_.mean(1), estimates_.std(1, ddof=1))


def canonical_shares(x: Samples, y: Samples) -> Samples:
    """How the linear part of the information in ``x [n, dx]`` and ``y [n, dy]`` divides over the pairs of canonical
    variables, ``[min(dx, dy)]``; evenly if there is none."""
    n, dx = x.shape
    dy = y.shape[1]
    x_basis, y_basis = (np.linalg.svd(z - z.mean(0), full_matrices=False)[0] for z in (x, y))
    squared = np.linalg.svd(x_basis.T @ y_basis, compute_uv=False)[: min(dx, dy)] ** 2
    # What independent samples have, on average (Wherry, 1931).
    squared = 1 - (1 - squared) * (n - 1) / max(1, n - 1 - max(dx, dy))
    information = -np.log1p(-np.clip(squared, 0, 1 - 1e-9))
    total = information.sum()
    return information / total if total > 1e-9 else np.full(len(information), 1 / len(information))


def _rotation(dims: int, rng: np.random.Generator) -> Samples:
    q, r = np.linalg.qr(rng.standard_normal((dims, dims)))
    return q * np.sign(np.diagonal(r))


def _smooth(values: Samples) -> Samples:
    """Means over neighbouring levels: a variance of four replicates is itself uncertain."""
    padded = np.concatenate([values[:1], values, values[-1:]])
    return (padded[:-2] + padded[1:-1] + padded[2:]) / 3
