"""What a report holds, before it is a page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..analysis import (
    AttentionMass,
    Comparison,
    Diagnosis,
    InformationGain,
    MaskStatistics,
    PairDistances,
    TokenMap,
    WeightShares,
)
from ..analysis.movement import Field


@dataclass(frozen=True)
class Absent:
    """A section that can't be computed."""

    #: Why, in a sentence.
    reason: str


@dataclass(frozen=True, eq=False)
class View:
    """A part of what a question is asked about, and how far its visual tokens were moved."""

    #: ``"image 1"``, ``"tile 2"``, ...
    name: str
    #: A PIL image, as the vision encoder saw it; None if that can't be told.
    picture: Any
    #: One map, or those of all tiles of an image, each with its place.
    maps: tuple[TokenMap, ...]


@dataclass(frozen=True)
class Answers:
    """What the model says to a question, greedily, with the adapter and without."""

    with_adapter: str
    without: str
    #: What the data say; None if they don't.
    expected: str | None

    @property
    def changed(self) -> bool:
        """Whether the adapter makes a difference."""
        return self.with_adapter != self.without


@dataclass(frozen=True, eq=False)
class Example:
    """A question of the data."""

    #: Its row in the data, from 1.
    number: int
    question: str
    answers: Answers
    #: PIL images, as the data have them.
    images: tuple[Any, ...]
    views: tuple[View, ...]


@dataclass(frozen=True, eq=False)
class Twins:
    """Two questions about one image."""

    #: Their rows in the data, from 1.
    numbers: tuple[int, int]
    questions: tuple[str, str]
    answers: tuple[Answers, Answers]
    #: The part of the image that is compared: the first, if it has several. A PIL image, or None.
    picture: Any
    comparison: Comparison


@dataclass(frozen=True, eq=False)
class Reading:
    """Which parts of an instruction an adapter reads: the weights of ``linear``, else attention; and the mask."""

    weights: WeightShares | None = None
    attention: AttentionMass | None = None
    mask: MaskStatistics | None = None


@dataclass(frozen=True, eq=False)
class Information:
    """What the visual tokens tell of the answers."""

    gain: InformationGain
    #: How many different answers there are if they were taken as labels; None if their words' embeddings were taken.
    labels: int | None


@dataclass(frozen=True, eq=False)
class Report:
    """What :func:`~emma_adapter.report.make_report` found."""

    #: Names of the model and the adapter, as for a title.
    model: str
    adapter: str
    #: The adapter's settings and what else is worth knowing, by name.
    facts: Mapping[str, str]
    #: Rows that were read, and of these, rows that show no image and were left out.
    rows: int
    imageless: int
    #: What the maps show: ``"gain"`` for ``modulation``, else ``"relative"``.
    field: Field
    examples: tuple[Example, ...]
    twins: tuple[Twins, ...] | Absent
    reading: Reading | Absent
    information: Information | Absent
    #: None if the data name no pairs.
    pairs: PairDistances | Absent | None
    diagnosis: Diagnosis | Absent
