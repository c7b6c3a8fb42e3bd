"""Rendering of a report as one HTML file that needs no script, no network and no other file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from . import page_drawings, page_text
from .contents import Report
from .drawing_contents import DrawingReport
from .figures import Figures

_HERE = Path(__file__).parent
#: Characters that HTML can't hold, and control characters.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_LONGEST = 1500


def render(report: Report | DrawingReport) -> str:
    """Render a report as an HTML page.

    The same report gives the same text, with the same versions of matplotlib and Pillow. Questions, answers, prompts
    and names are shown as text, whatever they contain.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else _clean(str(value)),
    )
    environment.filters["short"] = _shortened
    style = Markup((_HERE / "style.css").read_text(encoding="utf-8"))
    if isinstance(report, DrawingReport):
        return environment.get_template("drawings.html").render(page=page_drawings.page(report), style=style)
    figures = Figures()
    page = page_text.page(report, lambda draw, description: Markup(figures.inline(draw, _clean(description))))
    return environment.get_template("adapter.html").render(page=page, style=style)


def _clean(text: str) -> str:
    return _UNPRINTABLE.sub("\ufffd", text)


def _shortened(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}… ({len(text):,} characters)"
