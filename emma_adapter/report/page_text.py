"""Texts, pictures and tables of the page about an adapter, section by section, for the template."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from . import page_findings
from .contents import Absent, Answers, Example, Report, Twins, View
from .figures import common_limits, place_of
from .page_findings import Draw, Part, Table
from .pictures import data_uri, is_tiny
from .questions import normalised

#: The most images, and the most maps, shown of one question.
MAX_SHOWN = 6

_COLOURS = {
    "gain": "The map is |V'| / |V|, how much longer the adapter made a visual token: red was amplified, blue "
    "suppressed, what has no colour is as long as it was. What this fusion erases has moved the farthest, so that the "
    "amplified tokens are what it keeps.",
    "relative": "The map is |V' − V| / |V|, how far the adapter moved a visual token as a share of its length: yellow "
    "the farthest, violet the least. A token that moved is one that was changed, which need not be one that matters.",
}
_SCALE = "All maps have the same colours, but for the most extreme hundredth of their values."


def page(report: Report, draw: Draw) -> dict[str, Any]:
    """Return everything that the template shows.

    Args:
        report: the contents.
        draw: turns a figure and its description into a part of the page.
    """
    maps = [getattr(each, report.field) for example in report.examples for view in example.views for each in view.maps]
    limits = common_limits(maps)
    return {
        "model": report.model,
        "adapter": report.adapter,
        "summary": _summary(report),
        "answers": {
            "how": _choice(report),
            "cards": [_card(example, report.field, limits, draw) for example in report.examples],
            "read": f"{_COLOURS[report.field]} {_SCALE} The answers are what the model generates greedily; a few "
            "questions are examples, and no accuracy.",
        },
        "twins": _twins(report, draw),
        "reading": page_findings.reading(report.reading, draw),
        "information": page_findings.information(report.information, draw),
        "pairs": page_findings.pairs(report.pairs, draw),
        "diagnosis": page_findings.diagnosis(report.diagnosis, draw),
        "facts": Table("The adapter, and what this page was made of", (), _facts(report)),
    }


def _summary(report: Report) -> list[str]:
    examples = [example.answers for example in report.examples]
    changed = sum(answers.changed for answers in examples)
    lines = [f"It changes {changed} of the {len(examples)} answers that are shown."]
    gradable = [answers for answers in examples if answers.expected is not None]
    if gradable:
        right = _right(gradable)
        lines.append(
            f"Of the {len(gradable)} with an answer in the data, {right[1]} are answered so with the adapter and "
            f"{right[0]} without (capitals, spaces and a final full stop don't count)."
        )
    moved = [each.relative for example in report.examples for view in example.views for each in view.maps]
    if moved and all((values == 0).all() for values in moved):
        lines.append("It moves no visual token at all: this adapter is as it was before any training.")
    elif moved:
        mean = float(np.nanmean(np.concatenate([values.ravel() for values in moved])))
        share = f"{mean:.0%}" if mean >= 0.005 else "less than 1%"
        lines.append(f"It moves a visual token by {share} of its length on average.")
    lines += page_findings.in_short(report)
    return lines


def _right(gradable: list[Answers]) -> tuple[int, int]:
    """Return how many answers are right without and with the adapter."""
    return (
        sum(_same(answers.without, answers.expected) for answers in gradable),
        sum(_same(answers.with_adapter, answers.expected) for answers in gradable),
    )


def _same(answer: str, expected: str | None) -> bool:
    return expected is not None and normalised(answer) == normalised(expected)


def _choice(report: Report) -> str:
    usable = report.rows - report.imageless
    if len(report.examples) == usable:
        return "All questions of the data that show an image."
    return (
        f"{len(report.examples)} of {usable:,} questions, spread over the data (and over what is asked, where the data "
        "say it) whatever the answers are."
    )


def _card(example: Example, field: str, limits: Any, draw: Draw) -> dict[str, Any]:
    images = [
        shown_picture(image, f"Image {number} of question {example.number}", "as in the data")
        for number, image in enumerate(example.images[:MAX_SHOWN], 1)
    ]
    maps = [_map(view, field, limits, draw) for view in example.views[:MAX_SHOWN]]
    hidden = max(len(example.images) - MAX_SHOWN, 0), max(len(example.views) - MAX_SHOWN, 0)
    return {
        "number": example.number,
        "question": example.question,
        "answers": example.answers,
        "images": images,
        "maps": maps,
        "more": f"{hidden[0]} more images and {hidden[1]} more maps are not shown." if any(hidden) else "",
    }


def shown_picture(image: Any, alt: str, caption: str) -> dict[str, Any]:
    """Describe a PIL image for the template."""
    return {
        "src": data_uri(image),
        "alt": f"{alt}, {image.width} × {image.height} pixels",
        "caption": caption,
        "width": image.width,
        "height": image.height,
        "tiny": is_tiny(image),
    }


def _map(view: View, field: Any, limits: Any, draw: Draw) -> Part:
    from ..analysis.plots import plot_map

    maps = view.maps[0] if len(view.maps) == 1 else view.maps
    where = place_of(getattr(view.maps[0], field))
    background = "" if view.picture is not None else ", without the image, whose place isn't known"
    grid = "" if view.maps[0].norm.ndim == 2 else "; these visual tokens form no grid, so they are in a row"
    svg = draw(lambda: plot_map(maps, view.picture, field, limits=limits), f"Heat map over {view.name}: {where}{grid}")
    return Part(svg, f"{view.name}: {where}{background}{grid}")


def _twins(report: Report, draw: Draw) -> dict[str, Any]:
    if isinstance(report.twins, Absent):
        return {"absent": report.twins.reason}
    return {
        "absent": None,
        "couples": [_couple(twins, report.field, draw) for twins in report.twins],
        "read": f"{_COLOURS[report.field]} The first two maps of a couple have the same colours. The third is how far "
        "apart the two questions move the same token; where it is dark, the question makes no difference. An adapter "
        "whose maps are alike for every question changes the image, and doesn't listen.",
    }


def _couple(twins: Twins, field: Any, draw: Draw) -> dict[str, Any]:
    from ..analysis.plots import plot_difference, plot_map

    maps = (twins.comparison.first, twins.comparison.second)
    limits = common_limits([getattr(token_map, field) for token_map in maps])
    sides = []
    for token_map, question, answers in zip(maps, twins.questions, twins.answers, strict=True):
        where = place_of(getattr(token_map, field))
        svg = draw(partial(plot_map, token_map, twins.picture, field, limits=limits), f"Heat map: {where}")
        sides.append({"question": question, "answers": answers, "svg": svg, "caption": where})
    apart = place_of(twins.comparison.difference)
    difference = draw(lambda: plot_difference(twins.comparison, twins.picture), f"Heat map of the difference: {apart}")
    return {"numbers": twins.numbers, "sides": sides, "difference": difference, "difference_caption": apart}


def _facts(report: Report) -> list[tuple[str, ...]]:
    usable = report.rows - report.imageless
    rows = f"{usable:,} with an image"
    if report.imageless:
        rows += f"; {report.imageless:,} without one were left out, where an adapter does nothing"
    return [("Adapter", report.adapter), ("Model", report.model), *report.facts.items(), ("Questions", rows)]
