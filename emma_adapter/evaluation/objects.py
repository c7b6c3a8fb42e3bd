"""GenEval's rule (arXiv 2310.11513) for whether a picture shows the objects of its prompt."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

#: x0, y0, x1, y1 in pixels, y downwards.
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Found:
    """An object that a detector found, with its confidence."""

    box: Box
    score: float


def kept(found: Sequence[Found], *, threshold: float, max_overlap: float, most: int = 16) -> list[Found]:
    """Return the objects of one class that count, in order of confidence.

    Args:
        found: of one class.
        threshold: the confidence that they must exceed.
        max_overlap: intersection over union with a more confident object from which on they count as that same object;
            1 keeps all.
        most: how many of the most confident are considered.
    """
    confident = sorted((each for each in found if each.score > threshold), key=lambda each: -each.score)[:most]
    distinct: list[Found] = []
    for candidate in confident:
        if max_overlap == 1 or all(overlap(candidate.box, earlier.box) < max_overlap for earlier in distinct):
            distinct.append(candidate)
    return distinct


def overlap(one: Box, other: Box) -> float:
    """Return the intersection over the union of two boxes; 0 if both are empty."""

    def area(x0: float, y0: float, x1: float, y1: float) -> float:
        return max(x1 - x0, 0) * max(y1 - y0, 0)

    common = area(max(one[0], other[0]), max(one[1], other[1]), min(one[2], other[2]), min(one[3], other[3]))
    union = area(*one) + area(*other) - common
    return common / union if union else 0.0


def relations(one: Box, other: Box, margin: float = 0.1) -> set[str]:
    """Return the positions of one object relative to another, such as ``"left of"``.

    The offset of the centres is shortened along each axis by ``margin`` times the sum of both extents, and divided by
    its original length; more than 0.5 along an axis is a relation.
    """
    offsets = [(one[axis] + one[axis + 2] - other[axis] - other[axis + 2]) / 2 for axis in (0, 1)]
    extents = [abs(one[axis + 2] - one[axis]) + abs(other[axis + 2] - other[axis]) for axis in (0, 1)]
    length = math.hypot(*offsets)
    if length == 0:
        return set()
    x, y = (
        math.copysign(max(abs(offset) - margin * extent, 0), offset) / length
        for offset, extent in zip(offsets, extents, strict=True)
    )
    names = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, holds in names.items() if holds}


def judge_objects(
    row: Mapping[str, Any],
    objects: Mapping[str, Sequence[Found]],
    colours_of: Callable[[str, Sequence[Found]], list[str]],
) -> list[str]:
    """Return what is wrong with a picture; an empty list if it is right.

    Every clause of ``include`` must hold for its ``count`` most confident objects: there are that many, all have the
    colour, and each has the named relation to each object of the clause that its position refers to. Of a class of
    ``exclude``, there must be fewer than ``count``.

    Args:
        row: GenEval's metadata.
        objects: of each class, the most confident first.
        colours_of: the colours of objects of a class.
    """
    wrong: list[str] = []
    matched: list[Sequence[Found] | None] = []
    for clause in row.get("include", []):
        name, count = clause["class"], clause["count"]
        found = list(objects.get(name, ()))[:count]
        problem = _problem(clause, found, matched, colours_of)
        matched.append(None if problem else found)
        if problem:
            wrong.append(f"{name}: {problem}")
    for clause in row.get("exclude", []):
        present = len(objects.get(clause["class"], ()))
        if present >= clause["count"]:
            wrong.append(f"{clause['class']}: {present}, and fewer than {clause['count']} were wanted")
    return wrong


def _problem(
    clause: Mapping[str, Any],
    found: Sequence[Found],
    matched: Sequence[Sequence[Found] | None],
    colours_of: Callable[[str, Sequence[Found]], list[str]],
) -> str:
    if len(found) < clause["count"]:
        return f"{len(found)} of {clause['count']} found"
    if "color" in clause:
        colours = colours_of(clause["class"], found)
        if any(colour != clause["color"] for colour in colours):
            return f"{', '.join(colours)} instead of {clause['color']}"
    if "position" in clause:
        position, number = clause["position"]
        targets = matched[number]
        if targets is None:
            return f"nothing that it could be {position}"
        if any(position not in relations(each.box, target.box) for each in found for target in targets):
            return f"not {position} the other"
    return ""
