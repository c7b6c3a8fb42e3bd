"""The contents of a report on an adapter, before they become a page."""

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
    """An image, tile or frame of a question, and how far its visual tokens were moved."""

    #: ``"image 1"``, ``"tile 2"``, ...
    name: str
    #: A PIL image, as the vision encoder saw it; None if that isn't known.
    picture: Any
    #: One map, or those of all tiles of an image, each with its ``box``.
    maps: tuple[TokenMap, ...]


@dataclass(frozen=True)
class Answers:
    """The model's answers to a question, generated greedily, with the adapter and without."""

    with_adapter: str
    without: str
    #: The answer in the data; None if there is none.
    expected: str | None

    @property
    def changed(self) -> bool:
        """Whether the adapter changes the answer."""
        return self.with_adapter != self.without


@dataclass(frozen=True, eq=False)
class Example:
    """A question of the data."""

    #: Its row in the data, from 1.
    number: int
    question: str
    answers: Answers
    #: PIL images, as in the data.
    images: tuple[Any, ...]
    views: tuple[View, ...]


@dataclass(frozen=True, eq=False)
class Twins:
    """Two questions about one image."""

    #: Their rows in the data, from 1.
    numbers: tuple[int, int]
    questions: tuple[str, str]
    answers: tuple[Answers, Answers]
    #: The image, or its first part if it has several, which is the one that is compared. A PIL image, or None.
    picture: Any
    comparison: Comparison


@dataclass(frozen=True, eq=False)
class Reading:
    """Which parts of an instruction an adapter reads: the weights of ``linear``; else attention, and any mask."""

    weights: WeightShares | None = None
    attention: AttentionMass | None = None
    mask: MaskStatistics | None = None


@dataclass(frozen=True, eq=False)
class Information:
    """Information of the visual tokens about the answers."""

    gain: InformationGain
    #: The number of different answers if they were taken as labels; None if embeddings of their tokens were taken.
    labels: int | None


@dataclass(frozen=True, eq=False)
class Report:
    """The result of :func:`~emma_adapter.report.make_report`."""

    #: Names of the model and the adapter, for a title.
    model: str
    adapter: str
    #: The adapter's settings and other facts, by name.
    facts: Mapping[str, str]
    #: The number of rows that were read, and how many of them show no image and were left out.
    rows: int
    imageless: int
    #: The quantity that the maps show: ``"gain"`` for ``modulation``, else ``"relative"``.
    field: Field
    examples: tuple[Example, ...]
    twins: tuple[Twins, ...] | Absent
    reading: Reading | Absent
    information: Information | Absent
    #: None if the data name no pairs.
    pairs: PairDistances | Absent | None
    diagnosis: Diagnosis | Absent
