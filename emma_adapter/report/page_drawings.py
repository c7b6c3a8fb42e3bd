"""What the page about a model that draws says: texts, pictures and tables for the template."""

from __future__ import annotations

from typing import Any

from .drawing_contents import DrawingReport, Drawn
from .page_findings import Table
from .page_text import MAX_SHOWN, shown_picture

_PREVIEWS = (
    "A picture on the way is what the model took the finished one to be at that step: x0 = x_t − t·v, with the latents "
    "x_t before the step and the guided velocity v, decoded; t is 1 at noise and 0 at the end."
)
_ROUTED = (
    "A vision expert takes a picture if its probability exceeds that of the original tower by more than {margin:g}, "
    "unless it is told to; the margin is by how much the most probable expert's does."
)


def page(report: DrawingReport) -> dict[str, Any]:
    """Everything that the template shows."""
    edits = sum(bool(own.sources) for own in report.drawn)
    read = []
    if edits:
        read.append(
            f"A difference is |edited − source| of each colour, times {report.amplification:g}: what is black was left "
            f"as it was, and what differs by 1/{report.amplification:g} of the range or more is as bright as it gets. "
            "Its mean is of all pixels and colours, before it is amplified; the autoencoder alone makes some of it."
        )
    if any(own.previews for own in report.drawn):
        read.append(_PREVIEWS)
    if report.margin is not None and any(own.routed for own in report.drawn):
        read.append(_ROUTED.format(margin=report.margin))
    read.append("A few pictures are examples, and no measurement.")
    all_shown = len(report.drawn) == report.rows
    which = f"{len(report.drawn):,} of {report.rows:,} rows, spread over the data whatever was drawn."
    return {
        "model": report.model,
        "adapter": report.adapter,
        "summary": [
            "All rows of the data." if all_shown else which,
            f"{len(report.drawn) - edits:,} drawn from a prompt alone, {edits:,} edited.",
        ],
        "cards": [_card(own, report) for own in report.drawn],
        "read": " ".join(read),
        "settings": Table("How the pictures were drawn", (), list(report.settings.items())),
        "facts": Table(
            "What drew them",
            (),
            [("Branch", report.adapter), ("Model", report.model), *report.facts.items()],
        ),
    }


def _card(own: Drawn, report: DrawingReport) -> dict[str, Any]:
    row = f"row {own.number}"
    names = ["source"] if len(own.sources) == 1 else [f"source {number}" for number in range(1, len(own.sources) + 1)]
    pictures = [
        shown_picture(source, f"Reference picture of {row}: {name}", name)
        for source, name in list(zip(own.sources, names, strict=True))[:MAX_SHOWN]
    ]
    if own.wanted is not None:
        pictures.append(shown_picture(own.wanted, f"The picture that is wanted of {row}", "wanted, as in the data"))
    made = "edited" if own.sources else "drawn"
    size = f"{own.picture.width} × {own.picture.height} pixels"
    pictures.append(shown_picture(own.picture, f"The picture {made} of {row}", f"{made}, {size}"))
    if own.difference is not None:
        words = f"difference from {names[0]}, times {report.amplification:g}"
        words += f"; its mean is {own.difference.mean:.1%} of the range"
        words += ", of the source resized to the edited picture" if own.difference.resized else ""
        pictures.append(
            shown_picture(own.difference.picture, f"How far the edited picture of {row} is from its source", words)
        )
    left = len(own.sources) - MAX_SHOWN
    return {
        "number": own.number,
        "prompt": own.prompt,
        "seed": own.seed,
        "pictures": pictures,
        "previews": [
            shown_picture(
                one.picture,
                f"What {row} was taken to become at step {one.step}",
                f"step {one.step}, t = {one.time:.3g}",
            )
            for one in own.previews
        ],
        "routed": _routed(own),
        "more": f"{left} more reference pictures are not shown." if left > 0 else "",
    }


def _routed(own: Drawn) -> Table | None:
    if not own.routed:
        return None
    kind = "Source" if len(own.routed) == len(own.sources) else "Tile"
    rows = []
    for number, image in enumerate(own.routed, 1):
        original, *experts = image.probabilities.values()
        rows.append((f"{kind} {number}", image.expert, f"{max(experts) - original:+.3f}"))
    return Table("Where the reference pictures went", ("Picture", "Computed by", "Margin"), rows)
