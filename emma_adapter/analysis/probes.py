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
    def level(self) -> tuple[float, float]:
        """How far it gets from chance, 0, to always right, 1: the ends of the 95 % interval."""
        low, high = ((self.accuracy + side * self.margin - self.chance) / (1 - self.chance) for side in (-1, 1))
        return low, high

    @property
    def decodable(self) -> bool:
        """Better than chance by more than the error bar, and than all but one in twenty shuffles."""
        return self.accuracy - self.margin > max(self.chance, self.shuffled) and self.p_value <= 0.05


def probe(
    features: ArrayLike,
    labels: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    folds: int = 5,
    shuffles: int = 19,
    seed: int = 0,
) -> Probe:
    """A ridge classifier on the leading principal components of standardised features, at most 64, cross-validated with
    stratified folds. Its penalty is chosen within each fold, by leaving one out.

    Args:
        features: ``[n, d]`` floats.
        labels: ``[n]``, texts or integers.
        groups: ``[n]``, texts or integers: samples of different groups are probed, and shuffled, apart; accuracies are
            those of all samples. Default: all are one group.
        folds: of the cross-validation; labels with fewer samples in their group are left out, and so are groups in
            which less than two are left.
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
    parts = np.zeros(len(y), dtype=int) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    if parts.shape != y.shape:
        raise AnalysisError(f"groups must be [n], one for each of the {len(y)} samples; got {list(parts.shape)}")
    own = [rows for part in np.unique(parts) if len(rows := _often(y, np.flatnonzero(parts == part), folds))]
    if not own:
        raise AnalysisError(
            f"a probe with {folds} folds needs two labels with at least {folds} samples each; got "
            f"{sorted(np.bincount(y).tolist(), reverse=True)[:10]}"
        )
    told = [np.unique(y[rows], return_inverse=True)[1] for rows in own]
    splits = [_splits(x[rows], truth, folds, seed) for rows, truth in zip(own, told, strict=True)]
    samples = sum(map(len, own))
    everywhere = np.zeros(len(y), dtype=bool)
    for rows, split, truth in zip(own, splits, told, strict=True):
        everywhere[rows] = _right(split, truth)
    right = int(everywhere.sum())
    rng = np.random.default_rng(seed)
    shuffled = [
        sum(int(_right(split, rng.permutation(truth)).sum()) for split, truth in zip(splits, told, strict=True))
        / samples
        for _ in range(shuffles)
    ]
    return Probe(
        accuracy=right / samples,
        # As if one more of each had been right and wrong (Agresti and Coull, 1998): no error bar is 0.
        error=float(np.sqrt((p := (right + 2) / (samples + 4)) * (1 - p) / (samples + 4))),
        chance=sum(int(np.bincount(truth).max()) for truth in told) / samples,
        shuffled=float(np.mean(shuffled)) if shuffled else float("nan"),
        shuffled_max=max(shuffled, default=float("nan")),
        p_value=(1 + sum(one >= right / samples for one in shuffled)) / (1 + len(shuffled)),
        samples=samples,
        classes=len(np.unique(y[np.concatenate(own)])),
        right=everywhere,
    )


def _often(y: NDArray[np.int64], rows: NDArray[np.int64], folds: int) -> NDArray[np.int64]:
    """Those of the rows whose label is among them at least once for each fold; none if that is one label."""
    found = rows[np.bincount(y[rows], minlength=y.max() + 1)[y[rows]] >= folds]
    return found if len(np.unique(y[found])) > 1 else rows[:0]


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
