"""Texts, pictures and tables of the page about a model that draws, for the template."""

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
    """Return everything that the template shows."""
    edits = sum(bool(drawn.sources) for drawn in report.drawn)
    how_to_read = []
    if edits:
        how_to_read.append(
            f"A difference is |edited − source| of each colour, times {report.amplification:g}: what is black was left "
            f"as it was, and what differs by 1/{report.amplification:g} of the range or more is as bright as it gets. "
            "Its mean is of all pixels and colours, before it is amplified; the autoencoder alone makes some of it."
        )
    if any(drawn.previews for drawn in report.drawn):
        how_to_read.append(_PREVIEWS)
    if report.margin is not None and any(drawn.routed for drawn in report.drawn):
        how_to_read.append(_ROUTED.format(margin=report.margin))
    how_to_read.append("A few pictures are examples, and no measurement.")
    all_shown = len(report.drawn) == report.rows
    shown_part = f"{len(report.drawn):,} of {report.rows:,} rows, spread over the data whatever was drawn."
    return {
        "model": report.model,
        "adapter": report.adapter,
        "summary": [
            "All rows of the data." if all_shown else shown_part,
            f"{len(report.drawn) - edits:,} drawn from a prompt alone, {edits:,} edited.",
        ],
        "cards": [_card(drawn, report) for drawn in report.drawn],
        "read": " ".join(how_to_read),
        "settings": Table("How the pictures were drawn", (), list(report.settings.items())),
        "facts": Table(
            "What drew them",
            (),
            [("Branch", report.adapter), ("Model", report.model), *report.facts.items()],
        ),
    }


def _card(drawn: Drawn, report: DrawingReport) -> dict[str, Any]:
    row = f"row {drawn.number}"
    count = len(drawn.sources)
    names = ["source"] if count == 1 else [f"source {number}" for number in range(1, count + 1)]
    pictures = [
        shown_picture(source, f"Reference picture of {row}: {name}", name)
        for source, name in list(zip(drawn.sources, names, strict=True))[:MAX_SHOWN]
    ]
    if drawn.wanted is not None:
        pictures.append(shown_picture(drawn.wanted, f"The picture that is wanted of {row}", "wanted, as in the data"))
    verb = "edited" if drawn.sources else "drawn"
    size = f"{drawn.picture.width} × {drawn.picture.height} pixels"
    pictures.append(shown_picture(drawn.picture, f"The picture {verb} of {row}", f"{verb}, {size}"))
    if drawn.difference is not None:
        caption = f"difference from {names[0]}, times {report.amplification:g}"
        caption += f"; its mean is {drawn.difference.mean:.1%} of the range"
        caption += ", of the source resized to the edited picture" if drawn.difference.resized else ""
        pictures.append(
            shown_picture(drawn.difference.picture, f"How far the edited picture of {row} is from its source", caption)
        )
    hidden = count - MAX_SHOWN
    return {
        "number": drawn.number,
        "prompt": drawn.prompt,
        "seed": drawn.seed,
        "pictures": pictures,
        "previews": [
            shown_picture(
                preview.picture,
                f"What {row} was taken to become at step {preview.step}",
                f"step {preview.step}, t = {preview.time:.3g}",
            )
            for preview in drawn.previews
        ],
        "routed": _routed(drawn),
        "more": f"{hidden} more reference pictures are not shown." if hidden > 0 else "",
    }


def _routed(drawn: Drawn) -> Table | None:
    if not drawn.routed:
        return None
    kind = "Source" if len(drawn.routed) == len(drawn.sources) else "Tile"
    rows = []
    for number, image in enumerate(drawn.routed, 1):
        original, *experts = image.probabilities.values()
        rows.append((f"{kind} {number}", image.expert, f"{max(experts) - original:+.3f}"))
    return Table("Where the reference pictures went", ("Picture", "Computed by", "Margin"), rows)
