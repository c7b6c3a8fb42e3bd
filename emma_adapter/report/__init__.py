"""A page about one adapter: what the model answers with it and without, and the tables and figures of the analysis.

:func:`make_report` computes what the page holds, :func:`render` writes it as HTML that needs nothing else. Needs
``pip install "emma_adapter[report]"``. ``emma-adapter report`` is both in one command.
"""

from .compute import make_report
from .contents import Absent, Answers, Example, Information, Reading, Report, Twins, View
from .html import render
from .questions import Question

__all__ = [
    "Absent",
    "Answers",
    "Example",
    "Information",
    "Question",
    "Reading",
    "Report",
    "Twins",
    "View",
    "make_report",
    "render",
]
