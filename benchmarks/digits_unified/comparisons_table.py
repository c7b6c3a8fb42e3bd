"""The comparisons' tables: each arm's figures, and what they differ by from the default's on the same scenes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .records import interval, mean_and_interval

#: Task and figure of each column.
COLUMNS = {
    "drawn right": ("draw", "whole scene"),
    "edited cell": ("edit", "edited cell"),
    "edits right, whole": ("edit", "whole scene"),
    "other cells kept": ("edit", "other cells kept"),
    "pixel error of those": ("edit", "pixel error of other cells"),
}


def values_of(records: list[dict[str, Any]], task: str, figure: str) -> np.ndarray:
    """``[seeds, scenes]``, by seed."""
    ordered = sorted(records, key=lambda record: record["seed"])
    return np.array([record["figures"][task][figure] for record in ordered], dtype=float)


def difference(values: np.ndarray, default: np.ndarray) -> str:
    """Of two arms on the same scenes, paired: mean and 95 % interval over seeds and scenes."""
    average, low, high = interval(values - default)
    return f"{average:+.3f} ({low:+.3f} to {high:+.3f})"


def arms_table(records: list[dict[str, Any]], default: str) -> str:
    names = list(dict.fromkeys(record["arm"] for record in records))
    of = {name: [record for record in records if record["arm"] == name] for name in names}
    lines = [
        f"| | rate | trained | {' | '.join(COLUMNS)} |",
        "|---" + "|---:" * (2 + len(COLUMNS)) + "|",
    ]
    for name in names:
        first = of[name][0]
        cells = []
        for task, figure in COLUMNS.values():
            own = values_of(of[name], task, figure)
            same = default in of and len(of[default]) == len(own) and name != default
            cells.append(difference(own, values_of(of[default], task, figure)) if same else mean_and_interval(own))
        lines.append(f"| {name} | {first['rate']:g} | {first['parameters']:,} | {' | '.join(cells)} |")
    seeds = sorted({record["seed"] for record in records})
    first = records[0]
    return "\n".join([*lines, "", f"{len(seeds)} seeds, {first['steps']} steps.", ""])


def scales_table(records: list[dict[str, Any]]) -> str:
    """What guidance and describing do to the same trained branches."""
    tasks = [task for task in records[0]["figures"] if task not in ("draw", "edit")]
    lines = [f"| | {' | '.join(COLUMNS)} |", "|---" + "|---:" * len(COLUMNS) + "|"]
    for task in tasks:
        scores = records[0]["figures"][task]
        kind = "edit" if "edited cell" in scores else "draw"
        cells = [
            mean_and_interval(values_of(records, task, figure)) if own == kind else ""
            for own, figure in COLUMNS.values()
        ]
        lines.append(f"| {task} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def write_tables(records: list[dict[str, Any]], path: Path, default: str) -> str:
    """Write the tables as Markdown, and return them."""
    parts = [arms_table(records, default)]
    own = [record for record in records if record["arm"] == default]
    if own:
        parts.append(scales_table(own))
    text = "\n".join(parts)
    path.write_text(text)
    return text
