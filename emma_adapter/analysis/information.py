"""Mutual information with an error bar, and how much an adapter adds between visual tokens and responses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ..errors import AnalysisError
from .calibration import Calibration, calibrate_classes, calibrate_gaussians, canonical_shares
from .estimators import Labels, Samples, ksg, ross
from .observing import Model, VisualEntry, observed_batches
from .probes import Z

_MIN_SAMPLES = 50
_JACKKNIFE_BLOCKS = 10
_PERMUTATIONS = 10


@dataclass(frozen=True)
class MutualInformation:
    """An estimate, in nats (1 nat is 1.44 bits).

    The estimator reads only the leading principal components, and ``nats`` is about the information in these: by the
    data-processing inequality, it is at most that in the whole.
    """

    #: The estimate, corrected for the estimator's bias; never negative.
    nats: float
    #: Its standard error: that of the sample, by a delete-a-block jackknife or as seen on Gaussians, whichever is
    #: larger, combined with that of the correction.
    error: float
    #: The estimator's output.
    raw: float
    #: ``raw`` minus the truth, on average over Gaussians with as many samples and dimensions and as much information,
    #: divided over canonical pairs as the linear part of the data's (over Gaussian classes of the same sizes, for
    #: labels).
    bias: float
    #: Standard deviation of ``raw`` over such samples.
    spread: float
    #: Mean and standard deviation of ``raw`` with the pairing shuffled, where the truth is 0.
    shuffled: float
    shuffled_spread: float
    #: True if ``raw`` is about as high as the estimator gets with so few samples: the truth may be far above ``nats``.
    #: More samples, or fewer ``dims``, reach higher.
    saturated: bool
    estimator: Literal["ksg", "ross"]
    samples: int
    #: Principal components read of x and of y; 0 for labels.
    dims: tuple[int, int]
    #: The shares of the variances of x and y in these; 1 for labels.
    explained: tuple[float, float]

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval, if the data are as benign as Gaussians; without an upper end if ``saturated``."""
        return max(0.0, self.nats - Z * self.error), math.inf if self.saturated else self.nats + Z * self.error


@dataclass(frozen=True)
class InformationGain:
    """Mutual information between visual representations and responses, before and after alignment.

    Both are estimated from the same samples; the intervals take into account that they vary together.
    """

    before: MutualInformation
    after: MutualInformation
    #: ``after.nats - before.nats``, and its 95 % interval.
    difference: float
    difference_interval: tuple[float, float]
    #: ``after.nats / before.nats``, NaN if both are 0, and its 95 % interval; the paper reports 1.5 for its models.
    ratio: float
    ratio_interval: tuple[float, float]


def mutual_information(
    x: ArrayLike, y: ArrayLike, *, dims: int = 8, neighbours: int = 3, seed: int = 0
) -> MutualInformation:
    """Estimate the mutual information between representations and others, or labels.

    The estimate is by nearest neighbours (Kraskov et al. 2004; with labels Ross 2014) in the leading principal
    components of each side, each component mapped to a normal distribution by ranks, which keeps the information. It is
    corrected by what the same estimator gives on Gaussians whose information is known. Of the neural bounds, InfoNCE
    (van den Oord et al. 2018) can't exceed log n, those that can have a variance that grows exponentially with the
    information (Poole et al. 2019; McAllester and Stratos 2020), and each needs a network trained for it; this one is
    deterministic, takes seconds, and its error can be measured.

    Args:
        x: ``[n, dx]`` floats.
        y: ``[n, dy]`` floats, or ``[n]`` labels, strings or integers.
        dims: principal components to read of each side. More miss less information and have more bias.
        neighbours: k of the estimators.
        seed: of the samples for the calibration.

    Raises:
        AnalysisError: if there are fewer than 50 samples, or they aren't finite, have no variance, or are repeated
            although they aren't labels.
    """
    return _Estimation(x, y, dims, neighbours, seed).result


def information_gain(
    model: Model,
    batches: Iterable[Mapping[str, Any]],
    responses: Sequence[str] | ArrayLike,
    *,
    where: Literal["visual", "projected"] = "visual",
    pool: Callable[[Tensor], Tensor] | None = None,
    dims: int = 8,
    neighbours: int = 3,
    seed: int = 0,
) -> InformationGain:
    """Estimate how much more the visual tokens tell about the response once they are aligned with the instruction.

    The paper (arXiv 2410.02080, analysis of the alignment) measures another quantity: its authors' script
    (``llava/eval/eval_redun.py`` at commit 899b6ae) takes the channels of one visual token and of the response's
    encoding as samples of two numbers. Here a sample is a row of the data set. Only ratios within one run can be
    compared.

    Args:
        model: a patched model, or its handle.
        batches: outputs of the processor for prompts without answers.
        responses: one for each row that shows an image, in order: texts, which are taken as labels, or encodings
            ``[n, F]`` of longer responses, such as mean embeddings of their tokens.
        where: ``"visual"``, the projector's input; or ``"projected"``, its output, which a compressing projector has
            compressed.
        pool: makes one vector ``[F]`` of the tokens ``[N, D]`` of a row; default: their mean.
        dims: as for :func:`mutual_information`.
        neighbours: as for :func:`mutual_information`.
        seed: as for :func:`mutual_information`.

    Raises:
        PatchError: if the model is not patched.
        AnalysisError: as :func:`mutual_information`, or if there isn't one response for each row with an image.
    """
    if where not in ("visual", "projected"):
        raise AnalysisError(f'where= must be "visual" or "projected"; got {where!r}')
    pooled: tuple[list[Tensor], list[Tensor]] = ([], [])
    for batch in observed_batches(model, batches, projected=where == "projected"):
        for _, entries in batch:
            for vectors, tokens in zip(pooled, _representations(entries, where), strict=True):
                vectors.append(tokens.mean(0) if pool is None else pool(tokens))
    y = np.asarray(responses)
    if len(y) != len(pooled[0]):
        raise AnalysisError(f"{len(pooled[0])} rows show an image and there are {len(y)} responses: give one for each")
    estimations = [_Estimation(torch.stack(vectors).numpy(), y, dims, neighbours, seed) for vectors in pooled]
    before, after = (estimation.result for estimation in estimations)
    covariance = estimations[0].correlation(estimations[1]) * before.error * after.error
    difference = after.nats - before.nats
    error = math.sqrt(max(before.error**2 + after.error**2 - 2 * covariance, 0.0))
    return InformationGain(
        before=before,
        after=after,
        difference=difference,
        difference_interval=(difference - Z * error, difference + Z * error),
        ratio=_divided(after.nats, before.nats),
        ratio_interval=_fieller(after, before, covariance),
    )


class _Estimation:
    """An estimate with its jackknife replicates, which pair with those of another estimate on the same samples."""

    def __init__(self, x: ArrayLike, y: ArrayLike, dims: int, k: int, seed: int) -> None:
        x_values = _checked(x, "x")
        y_values = np.asarray(y)
        n = len(x_values)
        if len(y_values) != n or n < _MIN_SAMPLES:
            raise AnalysisError(
                f"mutual information needs at least {_MIN_SAMPLES} samples, as many of x as of y; got {n} and "
                f"{len(y_values)}"
            )
        self.x, explained_x = _components(x_values, dims)
        calibration: Calibration
        if y_values.ndim == 1:
            labels: Labels = np.unique(y_values, return_inverse=True)[1].astype(np.int64)
            self.y: Any = labels
            self.estimate: Callable[..., float] = ross
            calibration = calibrate_classes(self.x, labels, k, seed, lambda drawn: _components(drawn, dims)[0])
            dims_y, explained_y = 0, 1.0
        else:
            self.y, explained_y = _components(_checked(y_values, "y"), dims)
            self.estimate = ksg
            for name, side in (("x", self.x), ("y", self.y)):
                if len(np.unique(side, axis=0)) < 0.9 * n:
                    raise AnalysisError(
                        f"many samples of {name} are the same: give labels in place of vectors, one number or text each"
                    )
            dims_y = self.y.shape[1]
            shares = canonical_shares(self.x, self.y)
            calibration = calibrate_gaussians(n, (self.x.shape[1], dims_y), shares, k, seed)
        rng = np.random.default_rng(seed)
        raw = self.estimate(self.x, self.y, k)
        shuffled = [self.estimate(self.x, self.y[rng.permutation(n)], k) for _ in range(_PERMUTATIONS)]
        blocks = np.array_split(rng.permutation(n), _JACKKNIFE_BLOCKS)
        nats, self.slope, spread = calibration.correct(raw)
        replicates = [self.estimate(np.delete(self.x, block, 0), np.delete(self.y, block, 0), k) for block in blocks]
        self.deviations = (np.array(replicates) - np.mean(replicates)) * self.slope
        jackknife = math.sqrt((len(blocks) - 1) / len(blocks) * float((self.deviations**2).sum()))
        sampling = max(jackknife, spread * self.slope)
        # The correction is a mean over four replicates, so its standard error is half their spread.
        self.result = MutualInformation(
            nats=nats,
            error=math.hypot(sampling, spread * self.slope / 2),
            raw=raw,
            bias=raw - nats,
            spread=spread,
            shuffled=float(np.mean(shuffled)),
            shuffled_spread=float(np.std(shuffled, ddof=1)),
            saturated=calibration.is_saturated(raw),
            estimator="ross" if y_values.ndim == 1 else "ksg",
            samples=n,
            dims=(self.x.shape[1], dims_y),
            explained=(explained_x, explained_y),
        )

    def correlation(self, other: _Estimation) -> float:
        """Return the correlation of the two estimates over samples, by the jackknife."""
        lengths = np.linalg.norm(self.deviations) * np.linalg.norm(other.deviations)
        return float((self.deviations * other.deviations).sum() / lengths) if lengths > 0 else 0.0


def _representations(entries: Sequence[VisualEntry], where: str) -> tuple[Tensor, Tensor]:
    """Return the tokens of all media of a row before and after alignment, ``[N, D]`` each."""
    if where == "visual":
        return torch.cat([entry.before for entry in entries]), torch.cat([entry.after for entry in entries])
    parts = [entry for entry in entries if entry.projected is not None and not (entry.shared and entry.index)]
    before, after = ([part for entry in parts if (part := getattr(entry, name)) is not None] for name in _PROJECTED)
    return torch.cat(before), torch.cat(after)


_PROJECTED = ("projected_before", "projected")


def _checked(values: ArrayLike, name: str) -> Samples:
    array = np.asarray(values)
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.number):
        raise AnalysisError(f"{name} must be numbers [n, d]; got {array.dtype} {list(array.shape)}")
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        raise AnalysisError(f"{name} holds values that aren't finite: leave these samples out")
    return array


def _components(values: Samples, dims: int) -> tuple[Samples, float]:
    """Return the leading principal components, mapped to normal distributions, and their share of the variance."""
    if not isinstance(dims, int) or dims < 1:
        raise AnalysisError(f"dims= must be a number of principal components, at least 1; got {dims!r}")
    centred = values - values.mean(0)
    left, scales, _ = np.linalg.svd(centred, full_matrices=False)
    rank = int((scales > max(values.shape) * np.finfo(np.float64).eps * max(scales[0], np.abs(values).max())).sum())
    if rank == 0:
        raise AnalysisError("all samples are the same, so that they can tell nothing")
    leading = min(dims, rank)
    variance = scales**2
    return _normal_scores(left[:, :leading]), float(variance[:leading].sum() / variance.sum())


def _normal_scores(values: Samples) -> Samples:
    """Return each column's ranks as quantiles of the normal distribution; equal values stay equal."""
    scores = np.empty_like(values)
    for column in range(values.shape[1]):
        # Values that differ only by rounding in the decomposition count as equal.
        rounded = np.round(values[:, column], 12)
        _, inverse, counts = np.unique(rounded, return_inverse=True, return_counts=True)
        middle = np.cumsum(counts) - counts / 2
        scores[:, column] = _quantile((middle / len(values))[inverse])
    return scores


def _quantile(probabilities: NDArray[np.float64]) -> Samples:
    return torch.special.ndtri(torch.as_tensor(probabilities, dtype=torch.float64)).numpy()


def _divided(after: float, before: float) -> float:
    if before > 0:
        return after / before
    return math.inf if after > 0 else math.nan


def _fieller(after: MutualInformation, before: MutualInformation, covariance: float) -> tuple[float, float]:
    """Return the 95 % interval of a ratio (Fieller, 1954); without an upper end where ``before`` may be 0."""
    a, b = after.nats, before.nats
    # |a - r b|^2 <= z^2 var(a - r b), a quadratic in r.
    square = b**2 - Z**2 * before.error**2
    middle = a * b - Z**2 * covariance
    constant = a**2 - Z**2 * after.error**2
    if square <= 0:
        low = max(0.0, a - Z * after.error) / (b + Z * before.error) if b + before.error > 0 else 0.0
        return low, math.inf
    root = math.sqrt(max(middle**2 - square * constant, 0.0))
    return max(0.0, (middle - root) / square), (middle + root) / square
