"""Linear probes, which test whether a linear map reads labels off representations."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import AnalysisError

_MAX_COMPONENTS = 64
_PENALTIES = tuple(10.0**power for power in range(6))
#: Half the width of the 95 % interval of a normal distribution, in standard deviations.
Z = 1.96


@dataclass(frozen=True)
class Probe:
    """Accuracy of a cross-validated linear probe (Alain and Bengio 2016, arXiv 1610.01644), with its controls."""

    accuracy: float
    #: Binomial standard error of ``accuracy``.
    error: float
    #: Share of the most frequent label.
    chance: float
    #: Mean and largest accuracy of the same probe on shuffled labels, the control for what a probe memorises (in the
    #: manner of Hewitt and Liang 2019, arXiv 1909.03368).
    shuffled: float
    shuffled_max: float
    #: Share of the shuffles, with the real labels among them, that reach ``accuracy``:
    #: ``(1 + reached) / (1 + shuffles)``.
    p_value: float
    samples: int
    classes: int
    #: bool ``[n]``, which samples were right; paired with those of another probe on the same samples.
    right: NDArray[np.bool_] = field(repr=False, compare=False)

    @property
    def margin(self) -> float:
        """Half the width of the 95 % interval of ``accuracy``."""
        return Z * self.error

    def told(self) -> str:
        """Return the accuracy with its 95 % interval, as ``"64% ± 8%"``."""
        return f"{self.accuracy:.0%} ± {self.margin:.0%}"

    @property
    def level(self) -> tuple[float, float]:
        """The 95 % interval of the accuracy, on a scale from 0, chance, to 1, always right."""
        low, high = ((self.accuracy + side * self.margin - self.chance) / (1 - self.chance) for side in (-1, 1))
        return low, high

    @property
    def decodable(self) -> bool:
        """Whether it beats chance by more than the error bar, and all but one in twenty shuffles."""
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
    """Measure how well a linear probe reads labels off features.

    The probe is a ridge classifier on the leading principal components of standardised features, at most 64,
    cross-validated with stratified folds. Its penalty is chosen within each fold, by leaving one out.

    Args:
        features: ``[n, d]`` floats.
        labels: ``[n]``, texts or integers.
        groups: ``[n]``, texts or integers: each group is probed, and shuffled, on its own; accuracies are over all
            samples. Default: all are one group.
        folds: of the cross-validation; labels with fewer samples in their group are left out, and so are groups in
            which fewer than two labels are left.
        shuffles: of the labels, for the control; 19 are the fewest that can give a ``p_value`` of 0.05.
        seed: of folds and shuffles.

    Raises:
        AnalysisError: if features aren't finite or don't match the labels, or too few labels have enough samples.
    """
    x, y = np.asarray(features, dtype=np.float64), np.unique(np.asarray(labels), return_inverse=True)[1]
    if x.ndim != 2 or y.ndim != 1 or len(x) != len(y):
        raise AnalysisError(f"a probe needs features [n, d] and labels [n]; got {list(x.shape)} and {list(y.shape)}")
    if not np.isfinite(x).all():
        raise AnalysisError("the features hold values that aren't finite: leave these samples out")
    group_of = np.zeros(len(y), dtype=int) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    if group_of.shape != y.shape:
        raise AnalysisError(f"groups must be [n], one for each of the {len(y)} samples; got {list(group_of.shape)}")
    group_rows = _rows_by_group(y, group_of, folds)
    if not group_rows:
        raise AnalysisError(
            f"a probe with {folds} folds needs two labels with at least {folds} samples each; got "
            f"{sorted(np.bincount(y).tolist(), reverse=True)[:10]}"
        )
    group_labels = [np.unique(y[rows], return_inverse=True)[1] for rows in group_rows]
    splits = [_splits(x[rows], truth, folds, seed) for rows, truth in zip(group_rows, group_labels, strict=True)]
    samples = sum(map(len, group_rows))
    right = np.zeros(len(y), dtype=bool)
    for rows, split, truth in zip(group_rows, splits, group_labels, strict=True):
        right[rows] = _right(split, truth)
    right_count = int(right.sum())
    rng = np.random.default_rng(seed)
    shuffled = [
        sum(int(_right(split, rng.permutation(truth)).sum()) for split, truth in zip(splits, group_labels, strict=True))
        / samples
        for _ in range(shuffles)
    ]
    return Probe(
        accuracy=right_count / samples,
        # As if two more had been right, and two more wrong (Agresti and Coull, 1998), so that no error bar is 0.
        error=float(np.sqrt((p := (right_count + 2) / (samples + 4)) * (1 - p) / (samples + 4))),
        chance=sum(int(np.bincount(truth).max()) for truth in group_labels) / samples,
        shuffled=float(np.mean(shuffled)) if shuffled else float("nan"),
        shuffled_max=max(shuffled, default=float("nan")),
        p_value=(1 + sum(accuracy >= right_count / samples for accuracy in shuffled)) / (1 + len(shuffled)),
        samples=samples,
        classes=len(np.unique(y[np.concatenate(group_rows)])),
        right=right,
    )


def _rows_by_group(y: NDArray[np.int64], group_of: NDArray[np.int64], folds: int) -> list[NDArray[np.int64]]:
    """Return each group's rows whose label at least ``folds`` of them have, of groups with at least two such labels."""
    groups = []
    for group in np.unique(group_of):
        rows = np.flatnonzero(group_of == group)
        rows = rows[np.bincount(y[rows], minlength=y.max() + 1)[y[rows]] >= folds]
        if len(np.unique(y[rows])) > 1:
            groups.append(rows)
    return groups


@dataclass(frozen=True, eq=False)
class _Split:
    """Rows to train and to test on, and their reduced features; the reduction is fitted on the training rows alone."""

    train: NDArray[np.int64]
    test: NDArray[np.int64]
    seen: NDArray[np.float64]
    unseen: NDArray[np.float64]


def _splits(x: NDArray[np.float64], y: NDArray[np.int64], folds: int, seed: int) -> list[_Split]:
    from sklearn.decomposition import PCA
    from sklearn.model_selection import StratifiedKFold
    from sklearn.preprocessing import StandardScaler

    splits = []
    for train, test in StratifiedKFold(folds, shuffle=True, random_state=seed).split(x, y):
        scaler = StandardScaler().fit(x[train])
        seen, unseen = scaler.transform(x[train]), scaler.transform(x[test])
        reduce = PCA(min(_MAX_COMPONENTS, x.shape[1], len(train) - 1), svd_solver="full").fit(seen)
        splits.append(_Split(train, test, reduce.transform(seen), reduce.transform(unseen)))
    return splits


def _right(splits: list[_Split], y: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which samples are classified right by probes that weren't trained on them, bool ``[n]``."""
    from sklearn.linear_model import RidgeClassifierCV

    right = np.zeros(len(y), dtype=bool)
    for split in splits:
        if len(np.unique(y[split.train])) == 1:
            right[split.test] = y[split.test] == y[split.train[0]]
            continue
        classifier = RidgeClassifierCV(_PENALTIES).fit(split.seen, y[split.train])
        right[split.test] = classifier.predict(split.unseen) == y[split.test]
    return right
