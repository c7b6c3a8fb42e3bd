"""What the command can run: what practice does; or the parts of the fusions, measured first and on other bases."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from .plan import Job, parts_plan, practice_plan
from .results import Results
from .settings import Settings, ShortBases, TrainedOutBases
from .table import parts_markdown, practice_markdown


class Study(NamedTuple):
    settings: Settings
    results: Path
    #: Of the fusion that is asked about.
    plan: Callable[[str], list[Job]]
    markdown: Callable[[Results], str]


_FOLDER = Path("benchmarks/results")
STUDIES = {
    "practice": Study(TrainedOutBases(), _FOLDER / "digits-ablation.jsonl", practice_plan, practice_markdown),
    "parts": Study(ShortBases(), _FOLDER / "digits-ablation-short-bases.jsonl", parts_plan, parts_markdown),
}
