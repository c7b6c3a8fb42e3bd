"""Linear probes: can a label be read off representations by a linear map?"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import AnalysisError

_MAX_COMPONENTS = 64
_PENALTIES = tuple(10.0**power for power in range(6))
#: 95 % of a normal distribution.
Z = 1.96


@dataclass(frozen=True)
class Probe:
    """Accuracy of a cross-validated linear probe (Alain and Bengio 2016, arXiv 1610.01644), beside its controls."""

    accuracy: float
    #: Standard error of ``accuracy``: binomial.
    error: float
    #: Share of the most frequent label.
    chance: float
    #: Mean and largest accuracy of the same probe on shuffled labels, the control for what a probe learns by heart
    #: (in the manner of Hewitt and Liang 2019, arXiv 1909.03368).
    shuffled: float
    shuffled_max: float
    #: Share of shuffles, and the real labels, that reach ``accuracy``: ``(1 + reached) / (1 + shuffles)``.
    p_value: float
    samples: int
    classes: int
    #: bool ``[n]``, which samples were right: of two probes on the same samples, these are paired.
    right: NDArray[np.bool_] = field(repr=False, compare=False)

    @property
    def margin(self) -> float:
        """Half the width of the 95 % interval of ``accuracy``."""
        return Z * self.error

    def told(self) -> str:
        """The accuracy with its 95 % interval, as ``"64% ± 8%"``."""
        return f"{self.accuracy:.0%} ± {self.margin:.0%}"

    @property
    def decodable(self) -> bool:
        """Better than chance by more than the error bar, and than all but one in twenty shuffles."""
        return self.accuracy - self.margin > max(self.chance, self.shuffled) and self.p_value <= 0.05


def probe(features: ArrayLike, labels: ArrayLike, *, folds: int = 5, shuffles: int = 19, seed: int = 0) -> Probe:
    """A ridge classifier on the leading principal components of standardised features, at most 64, cross-validated with
    stratified folds. Its penalty is chosen within each fold, by leaving one out.

    Args:
        features: ``[n, d]`` floats.
        labels: ``[n]``, texts or integers.
        folds: of the cross-validation; labels with fewer samples are left out.
        shuffles: of the labels, for the control; 19 are the fewest that can give ``p_value`` 0.05.
        seed: of folds and shuffles.

    Raises:
        AnalysisError: if there aren't two labels with enough samples, features and labels don't match, or features
            aren't finite.
    """
    x, y = np.asarray(features, dtype=np.float64), np.unique(np.asarray(labels), return_inverse=True)[1]
    if x.ndim != 2 or y.ndim != 1 or len(x) != len(y):
        raise AnalysisError(f"a probe needs features [n, d] and labels [n]; got {list(x.shape)} and {list(y.shape)}")
    if not np.isfinite(x).all():
        raise AnalysisError("the features hold values that aren't finite: leave these samples out")
    counts = np.bincount(y)
    keep = counts[y] >= folds
    if len(np.unique(y[keep])) < 2:
        raise AnalysisError(
            f"a probe with {folds} folds needs two labels with at least {folds} samples each; got "
            f"{sorted(counts.tolist(), reverse=True)[:10]}"
        )
    x, y = x[keep], np.unique(y[keep], return_inverse=True)[1]
    splits = _splits(x, y, folds, seed)
    right = _right(splits, y)
    accuracy = float(right.mean())
    rng = np.random.default_rng(seed)
    shuffled = [float(_right(splits, rng.permutation(y)).mean()) for _ in range(shuffles)]
    everywhere = np.zeros(len(keep), dtype=bool)
    everywhere[keep] = right
    return Probe(
        accuracy=accuracy,
        # As if one more of each had been right and wrong (Agresti and Coull, 1998): no error bar is 0.
        error=float(np.sqrt((p := (right.sum() + 2) / (len(y) + 4)) * (1 - p) / (len(y) + 4))),
        chance=float(np.bincount(y).max() / len(y)),
        shuffled=float(np.mean(shuffled)) if shuffled else float("nan"),
        shuffled_max=max(shuffled, default=float("nan")),
        p_value=(1 + sum(one >= accuracy for one in shuffled)) / (1 + len(shuffled)),
        samples=len(y),
        classes=len(np.unique(y)),
        right=everywhere,
    )


@dataclass(frozen=True, eq=False)
class _Split:
    """Rows to learn from and to tell, and their reduced features; what reduces them hasn't seen the latter."""

    train: NDArray[np.int64]
    test: NDArray[np.int64]
    seen: NDArray[np.float64]
    unseen: NDArray[np.float64]


def _splits(x: NDArray[np.float64], y: NDArray[np.int64], folds: int, seed: int) -> list[_Split]:
    from sklearn.decomposition import PCA
    from sklearn.model_selection import StratifiedKFold
    from sklearn.preprocessing import StandardScaler

    found = []
    for train, test in StratifiedKFold(folds, shuffle=True, random_state=seed).split(x, y):
        scaler = StandardScaler().fit(x[train])
        seen, unseen = scaler.transform(x[train]), scaler.transform(x[test])
        reduce = PCA(min(_MAX_COMPONENTS, x.shape[1], len(train) - 1), svd_solver="full").fit(seen)
        found.append(_Split(train, test, reduce.transform(seen), reduce.transform(unseen)))
    return found


def _right(splits: list[_Split], y: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which samples are told right by probes that didn't see them."""
    from sklearn.linear_model import RidgeClassifierCV

    right = np.zeros(len(y), dtype=bool)
    for split in splits:
        if len(np.unique(y[split.train])) == 1:
            right[split.test] = y[split.test] == y[split.train[0]]
            continue
        classifier = RidgeClassifierCV(_PENALTIES).fit(split.seen, y[split.train])
        right[split.test] = classifier.predict(split.unseen) == y[split.test]
    return right
