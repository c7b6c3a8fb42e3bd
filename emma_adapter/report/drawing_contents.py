"""What a report on a model that draws holds, before it is a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..experts.scopes import RoutedImage


@dataclass(frozen=True, eq=False)
class Preview:
    """What the model took the finished picture to be at one step: x0 = x_t - t·v, decoded."""

    #: From 1.
    step: int
    #: t at which the step began, 1 being noise.
    time: float
    #: A PIL image.
    picture: Any


@dataclass(frozen=True, eq=False)
class Difference:
    """How far an edit is from its first reference picture, which is resized to it if it has another size."""

    #: |edited - source| of each colour, times the report's ``amplification``; a PIL image.
    picture: Any
    #: Of all pixels and colours, before it is amplified; 1 is from black to white.
    mean: float
    resized: bool


@dataclass(frozen=True, eq=False)
class Drawn:
    """A row, and what was drawn of it."""

    #: Its row in the data, from 1.
    number: int
    prompt: str
    #: Of the noise.
    seed: int
    #: Reference pictures; PIL images.
    sources: tuple[Any, ...]
    #: As the data have it; None if they don't.
    wanted: Any
    #: What was drawn, a PIL image.
    picture: Any
    previews: tuple[Preview, ...]
    #: None without reference pictures.
    difference: Difference | None
    #: Of each reference picture, or of each of their tiles where the model routes these; empty without vision experts.
    routed: tuple[RoutedImage, ...]


@dataclass(frozen=True, eq=False)
class DrawingReport:
    """What :func:`~emma_adapter.report.make_drawing_report` found."""

    #: Names of the model and of what draws, as for a title.
    model: str
    adapter: str
    #: What draws, and what else is worth knowing, by name.
    facts: Mapping[str, str]
    #: How the pictures were drawn, by name.
    settings: Mapping[str, str]
    #: In the data.
    rows: int
    drawn: Sequence[Drawn]
    #: Factor of the differences.
    amplification: float
    #: By how much an expert's probability must exceed the original's; None without vision experts.
    margin: float | None
