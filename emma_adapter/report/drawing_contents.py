"""The contents of a report on a model that draws, before they become a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..experts.scopes import RoutedImage


@dataclass(frozen=True, eq=False)
class Preview:
    """The model's estimate of the finished picture at one step: x0 = x_t - t·v, decoded."""

    #: From 1.
    step: int
    #: t at which the step began; 1 is noise.
    time: float
    #: A PIL image.
    picture: Any


@dataclass(frozen=True, eq=False)
class Difference:
    """How far an edit is from its first reference picture, which is resized if the sizes differ."""

    #: |edited - source| of each colour, times the report's ``amplification``; a PIL image.
    picture: Any
    #: Mean over all pixels and colours, before amplification; 1 is the difference between black and white.
    mean: float
    resized: bool


@dataclass(frozen=True, eq=False)
class Drawn:
    """A row, and the picture that was drawn for it."""

    #: Its row in the data, from 1.
    number: int
    prompt: str
    #: Of the noise.
    seed: int
    #: Reference pictures; PIL images.
    sources: tuple[Any, ...]
    #: The target picture in the data; None if there is none.
    wanted: Any
    #: The picture that was drawn, a PIL image.
    picture: Any
    previews: tuple[Preview, ...]
    #: None without reference pictures.
    difference: Difference | None
    #: Where each reference picture went, or each of its tiles where the model routes these; empty without vision
    #: experts.
    routed: tuple[RoutedImage, ...]


@dataclass(frozen=True, eq=False)
class DrawingReport:
    """The result of :func:`~emma_adapter.report.make_drawing_report`."""

    #: Names of the model and of what draws, for a title.
    model: str
    adapter: str
    #: Facts about what draws, by name.
    facts: Mapping[str, str]
    #: How the pictures were drawn, by name.
    settings: Mapping[str, str]
    #: The number of rows in the data.
    rows: int
    drawn: Sequence[Drawn]
    #: The factor of the differences.
    amplification: float
    #: The excess over the original's probability that an expert's needs; None without vision experts.
    margin: float | None
