"""A page about one adapter: what the model answers with it and without, and the tables and figures of the analysis; or
about a model that draws: prompts and pictures.

:func:`make_report` or :func:`make_drawing_report` computes what the page holds, :func:`render` writes it as HTML that
needs nothing else. Needs
``pip install "emma_adapter[report]"``. ``emma-adapter report`` is both in one command.
"""

from .compute import make_report
from .compute_drawings import make_drawing_report
from .contents import Absent, Answers, Example, Information, Reading, Report, Twins, View
from .drawing_contents import Difference, DrawingReport, Drawn, Preview
from .html import render
from .questions import Question

__all__ = [
    "Absent",
    "Answers",
    "Difference",
    "DrawingReport",
    "Drawn",
    "Example",
    "Information",
    "Preview",
    "Question",
    "Reading",
    "Report",
    "Twins",
    "View",
    "make_drawing_report",
    "make_report",
    "render",
]
