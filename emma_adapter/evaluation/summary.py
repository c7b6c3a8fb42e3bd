"""Means of the scores of pictures, over all and by tag, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

_RESAMPLES = 10_000


@dataclass(frozen=True)
class Score:
    """A judge's score of a picture.

    Attributes:
        row: number of its row, from 0.
        picture: its file, relative to the folder of pictures.
        tag: of the row.
        measure: what was measured.
        value: None if the judge's answer couldn't be read.
        told: the reason: what is wrong, or the judge's answers.
    """

    row: int
    picture: str
    tag: str
    measure: str
    value: float | None
    told: Any


@dataclass(frozen=True)
class Line:
    """A mean. ``low`` and ``high`` are its 95 % interval; all three are None if no answer could be read."""

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

    A prompt's value is the mean over its pictures, a tag's the mean over its prompts. "all" is the mean of the tags,
    each with the same weight, as in GenEval and GEdit-Bench; for questions it is the mean over the prompts, as in
    DPG-Bench. Intervals are the 2.5th and 97.5th percentiles of the bootstrap over prompts, within each tag where tags
    have the same weight. Answers that couldn't be read are left out, and counted.
    """
    lines = []
    for measure in dict.fromkeys(score.measure for score in scores):
        measured = [score for score in scores if score.measure == measure]
        tags = list(dict.fromkeys(score.tag for score in measured))
        groups = {tag: [score for score in measured if score.tag == tag] for tag in tags}
        pooled = measure == "questions"
        lines.append(_line(measure, "all", [measured] if pooled else list(groups.values()), seed))
        if tags != [""]:
            lines += [_line(measure, tag or "no tag", [group], seed) for tag, group in groups.items()]
    return lines


def _line(measure: str, tag: str, groups: Sequence[Sequence[Score]], seed: int) -> Line:
    means = [group_means for group_means in map(_prompt_means, groups) if len(group_means)]
    scores = [score for group in groups for score in group]
    readable = sum(score.value is not None for score in scores)
    counts = {"prompts": sum(map(len, means)), "pictures": readable, "unreadable": len(scores) - readable}
    if not means:
        return Line(measure, tag, None, None, None, **counts)
    random = np.random.default_rng(seed)
    resampled = np.zeros(_RESAMPLES)
    for group_means in means:
        for start in range(0, _RESAMPLES, 500):  # at most a few megabytes at a time
            chosen = random.integers(len(group_means), size=(500, len(group_means)))
            resampled[start : start + 500] += group_means[chosen].mean(axis=1) / len(means)
    low, high = np.percentile(resampled, [2.5, 97.5])
    mean = float(np.mean([group_means.mean() for group_means in means]))
    return Line(measure, tag, mean, float(low), float(high), **counts)


def _prompt_means(scores: Sequence[Score]) -> np.ndarray[Any, Any]:
    rows: dict[int, list[float]] = {}
    for score in scores:
        if score.value is not None:
            rows.setdefault(score.row, []).append(score.value)
    return np.array([np.mean(values) for values in rows.values()])


def table(lines: Sequence[Line]) -> str:
    """Return the means as a table in plain text."""
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
    """Return the means as JSON types."""
    return [asdict(line) for line in lines]
