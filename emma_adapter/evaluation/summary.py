"""Means with intervals, over all and by tag, of the scores of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

_RESAMPLES = 10_000


@dataclass(frozen=True)
class Score:
    """What a judge made of a picture.

    Attributes:
        row: number of its row, from 0.
        picture: its file, relative to the folder of pictures.
        tag: of the row.
        measure: what was measured.
        value: None if the judge's answer couldn't be read.
        told: why.
    """

    row: int
    picture: str
    tag: str
    measure: str
    value: float | None
    told: Any


@dataclass(frozen=True)
class Line:
    """A mean. ``low`` and ``high`` are its 95 % interval; the three are None if nothing could be read."""

    measure: str
    tag: str
    mean: float | None
    low: float | None
    high: float | None
    prompts: int
    pictures: int
    unreadable: int


def summarise(scores: Sequence[Score], seed: int = 0) -> list[Line]:
    """Return the mean of each measure, over all (``tag="all"``) and by tag.

    Of each prompt the mean over its pictures is taken, of each tag the mean over its prompts. "all" is the mean of the
    tags, each weighing the same, as GenEval and GEdit-Bench have it; of questions it is the mean over the prompts, as
    DPG-Bench has it. Intervals are the 2.5th and 97.5th percentile of the bootstrap over prompts, within each tag
    where tags weigh the same. Answers that couldn't be read are left out, and counted.
    """
    lines = []
    for measure in dict.fromkeys(score.measure for score in scores):
        own = [score for score in scores if score.measure == measure]
        tags = list(dict.fromkeys(score.tag for score in own))
        groups = {tag: [score for score in own if score.tag == tag] for tag in tags}
        pooled = measure == "questions"
        lines.append(_line(measure, "all", [own] if pooled else list(groups.values()), seed))
        if tags != [""]:
            lines += [_line(measure, tag or "no tag", [group], seed) for tag, group in groups.items()]
    return lines


def _line(measure: str, tag: str, groups: Sequence[Sequence[Score]], seed: int) -> Line:
    means = [made for made in map(_prompt_means, groups) if len(made)]
    every = [score for group in groups for score in group]
    readable = sum(score.value is not None for score in every)
    counts = {"prompts": sum(map(len, means)), "pictures": readable, "unreadable": len(every) - readable}
    if not means:
        return Line(measure, tag, None, None, None, **counts)
    random = np.random.default_rng(seed)
    drawn = np.zeros(_RESAMPLES)
    for own in means:
        for start in range(0, _RESAMPLES, 500):  # at most a few megabytes at a time
            chosen = random.integers(len(own), size=(500, len(own)))
            drawn[start : start + 500] += own[chosen].mean(axis=1) / len(means)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Line(measure, tag, float(np.mean([own.mean() for own in means])), float(low), float(high), **counts)


def _prompt_means(scores: Sequence[Score]) -> np.ndarray[Any, Any]:
    rows: dict[int, list[float]] = {}
    for score in scores:
        if score.value is not None:
            rows.setdefault(score.row, []).append(score.value)
    return np.array([np.mean(values) for values in rows.values()])


def table(lines: Sequence[Line]) -> str:
    """Return the means as text."""
    cells = [("measure", "tag", "mean", "95 % interval", "prompts", "pictures", "unreadable")]
    for line in lines:
        mean = "-" if line.mean is None else f"{line.mean:.3f}"
        interval = "-" if line.low is None else f"{line.low:.3f} to {line.high:.3f}"
        cells.append(
            (line.measure, line.tag, mean, interval, str(line.prompts), str(line.pictures), str(line.unreadable))
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    )


def as_json(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Return the means as JSON has them."""
    return [asdict(line) for line in lines]
