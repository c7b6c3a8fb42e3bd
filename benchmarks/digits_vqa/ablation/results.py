"""From records to the numbers in table and figure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import click
import numpy as np

from ..pooled_llava import POOLINGS
from ..questions import Question
from ..runs import ask_for_pairs, ask_for_test
from . import recipes
from .records import Record, unpack
from .settings import Settings
from .statistics import Clusters, Estimate, mean_over_types
from .worker import fingerprint

#: A control may have this much more than an arm: ranks are whole numbers.
_SAME_SIZE = 1.05


@dataclass(frozen=True)
class ArmResult:
    """All runs of one arm at one pooling."""

    arm: str
    pooling: str
    runs: int
    parameters: int
    seconds: float
    rate: float
    rate_at_edge: bool
    #: Share of the runs that were right, by base checkpoint: ``[questions]``, and of pairs ``[pairs]``.
    right: dict[int, np.ndarray] = field(repr=False)
    pairs_right: dict[int, np.ndarray] = field(repr=False)


class Results:
    """The test runs of one plan.

    Raises:
        click.ClickException: if there are none, or if they are of other questions than this version asks.
    """

    def __init__(self, records: list[Record], settings: Settings, fusion: str) -> None:
        self.fusion = fusion
        questions, pairs = self.asked(settings)
        self.questions = Clusters.of([q.scene for q in questions], [q.type for q in questions])
        self._types = np.array([q.type for q in questions])
        # A pair of scenes is drawn together, and pairs are one kind.
        self.pairs = Clusters.of(list(range(len(pairs) // 2)), ["pair"] * (len(pairs) // 2))
        asked = fingerprint(questions + pairs)
        tested = [record for record in records if record.split == "test"]
        if not tested:
            raise click.ClickException(
                "there are no finished test runs yet; run python -m benchmarks.digits_vqa.ablation"
            )
        if any(record.questions != asked for record in tested):
            raise click.ClickException(
                "there are records of other questions than this version of the benchmark asks; remove the results "
                "file, and start again"
            )
        members: dict[tuple[str, str], list[Record]] = {}
        for record in tested:
            members.setdefault((record.arm, record.pooling), []).append(record)
        self.arms = {key: self._arm(found) for key, found in members.items()}

    def asked(self, settings: Settings) -> tuple[list[Question], list[Question]]:
        """The questions of the test, and those of its pairs."""
        _, questions = ask_for_test(settings.test_scenes, "test")
        _, _, pairs = ask_for_pairs(settings.test_scenes, "test")
        return questions, pairs

    def _arm(self, found: list[Record]) -> ArmResult:
        right: dict[int, list[np.ndarray]] = {}
        pairs_right: dict[int, list[np.ndarray]] = {}
        for record in found:
            right.setdefault(record.base, []).append(unpack(record.right, len(self.questions.scenes)))
            of_pairs = unpack(record.pairs_right, 2 * len(self.pairs.scenes)).reshape(-1, 2)
            pairs_right.setdefault(record.base, []).append(of_pairs[:, 0] & of_pairs[:, 1])
        first = found[0]
        return ArmResult(
            first.arm,
            first.pooling,
            len(found),
            first.parameters,
            float(np.median([record.cpu_seconds for record in found])),
            first.rate,
            bool(first.rate_at_edge),
            {base: np.mean(runs, axis=0) for base, runs in right.items()},
            {base: np.mean(runs, axis=0) for base, runs in pairs_right.items()},
        )

    def get(self, arm: str, pooling: str = "1") -> ArmResult | None:
        return self.arms.get((arm, pooling))

    def found(self, arms: Iterable[str], pooling: str = "1") -> list[ArmResult]:
        """Those of them that were run."""
        return [found for arm in arms if (found := self.get(arm, pooling)) is not None]

    @property
    def poolings(self) -> list[str]:
        return [pooling for pooling in POOLINGS if any(pooling == own for _, own in self.arms)]

    def mean(self, arm: ArmResult) -> Estimate:
        return mean_over_types(_over_bases(arm.right), self.questions)

    def mean_of_base(self, arm: ArmResult, base: int) -> float:
        return self._share(arm.right[base])

    def mean_of_type(self, arm: ArmResult, type: str | None) -> float:
        """Over question types if it is None."""
        right = _over_bases(arm.right)
        return self._share(right) if type is None else float(right[self._types == type].mean())

    def pair_accuracy(self, arm: ArmResult) -> Estimate:
        return mean_over_types(_over_bases(arm.pairs_right), self.pairs)

    def gain(self, arm: ArmResult, over: ArmResult) -> Estimate:
        """Paired by base checkpoint and question."""
        common = sorted(set(arm.right) & set(over.right))
        return mean_over_types(np.mean([arm.right[base] - over.right[base] for base in common], axis=0), self.questions)

    def gain_by_base(self, arm: ArmResult, over: ArmResult) -> list[float]:
        common = sorted(set(arm.right) & set(over.right))
        return [self._share(arm.right[base] - over.right[base]) for base in common]

    def controls(self, arm: ArmResult) -> list[ArmResult]:
        """Those of the arm's pooling that have no more parameters than it, or than the adapter of the regime if the
        arm is smaller. Shuffled and constant instructions are of ``fusion``."""
        limit = _SAME_SIZE * max(arm.parameters, recipes.ADAPTER_SIZE)
        found = self.found(recipes.controls(self.fusion), arm.pooling)
        return [control for control in found if control.parameters <= limit]

    def best_control(self, arm: ArmResult) -> ArmResult | None:
        """The best on the test itself, which favours the controls; None for these, and for the base model."""
        if arm.arm in (recipes.BASE, *recipes.controls(self.fusion)):
            return None
        return max(self.controls(arm), key=lambda control: self._share(_over_bases(control.right)), default=None)

    def _share(self, values: np.ndarray) -> float:
        """Without an interval, which takes far longer."""
        return mean_over_types(values, self.questions, 1).value


def _over_bases(by_base: dict[int, np.ndarray]) -> np.ndarray:
    mean: np.ndarray = np.mean(list(by_base.values()), axis=0)
    return mean
