"""Reports: a page about an adapter, or about a model that draws.

The first shows answers with the adapter and without, and tables and figures of the analysis; the second prompts and
pictures. :func:`make_report` or :func:`make_drawing_report` computes the contents, :func:`render` makes
self-contained HTML of them. Needs ``pip install "emma_adapter[report]"``. ``emma-adapter report`` does both in one
command.
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
