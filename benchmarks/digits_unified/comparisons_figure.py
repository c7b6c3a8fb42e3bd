"""The comparisons as a figure: of each arm the mean over seeds, and its 95 % interval."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from .comparisons_table import values_of
from .records import interval

_PANELS = {
    "pictures drawn right, all four cells": ("draw", "whole scene"),
    "edited cells right": ("edit", "edited cell"),
    "other cells kept": ("edit", "other cells kept"),
}


def draw_figure(records: list[dict[str, Any]], default: str, path: Path) -> None:
    """Draw the runs of every arm's best rate; a line marks the default arm's mean."""
    names = list(dict.fromkeys(record["arm"] for record in records))
    figure, axes = plt.subplots(
        1, len(_PANELS), figsize=(13, 0.4 * len(names) + 1.2), sharey=True, layout="constrained"
    )
    for axis, (title, (task, name)) in zip(axes, _PANELS.items(), strict=True):
        for place, arm in enumerate(names):
            values = values_of([record for record in records if record["arm"] == arm], task, name)
            mean, low, high = interval(values)
            colour = "#1d4ed8" if arm == default else "#6b7280"
            axis.plot([low, high], [place, place], color=colour, linewidth=2)
            axis.plot(values.mean(axis=1), [place] * len(values), "|", color=colour, alpha=0.6)
            axis.plot(mean, place, "o", color=colour, markersize=6)
            if arm == default:
                axis.axvline(mean, color=colour, alpha=0.25)
        axis.set_title(title, fontsize=10)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    axes[1].set_xlabel("share of unseen scenes; 95 % intervals; |: seeds")
    figure.savefig(path, dpi=110)
    plt.close(figure)
