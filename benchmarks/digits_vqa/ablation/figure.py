"""The figure: every arm at one token an image, and what becomes of the gain with more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from . import recipes
from .results import Results
from .table import sections

_COLOURS = ("#6b7280", "#1d4ed8", "#0f766e", "#be185d", "#b45309", "#7c3aed")


def draw(results: Results, path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 7), width_ratios=(3, 2), layout="constrained")
    _draw_arms(left, results)
    _draw_poolings(right, results)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_arms(axis: Any, results: Results) -> None:
    names: list[str] = []
    for (section, arms), colour in zip(sections(results.fusion).items(), _COLOURS, strict=True):
        for number, arm in enumerate(results.found(arms)):
            estimate = results.mean(arm)
            axis.plot([100 * estimate.low, 100 * estimate.high], [len(names)] * 2, color=colour, linewidth=2)
            # Means of each base checkpoint, to show how far they lie apart.
            over = {base: results.mean_of_base(arm, base) for base in arm.right}
            axis.plot([100 * value for value in over.values()], [len(names)] * len(over), "|", color=colour, alpha=0.5)
            axis.plot(
                100 * estimate.value, len(names), "o", color=colour, markersize=6, label=section if not number else None
            )
            names.append(arm.arm)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.3)
    axis.set_xlabel("accuracy on unseen handwriting, mean over question types, %\n95 % intervals; |: base checkpoints")
    axis.set_title("one token an image")
    axis.legend(loc="upper right", fontsize=9)


def _draw_poolings(axis: Any, results: Results) -> None:
    poolings, fusion = results.poolings, results.fusion
    colours = {
        recipes.BASE: "#9ca3af",
        recipes.lora(): "#6b7280",
        recipes.lora(2): "#374151",
        recipes.lora(3): "#111827",
        fusion: "#1d4ed8",
        recipes.joint(fusion): "#be185d",
        recipes.joint(fusion, 2): "#f472b6",
    }
    for number, (name, colour) in enumerate(colours.items()):
        found = [(pooling, arm) for pooling in poolings if (arm := results.get(name, pooling)) is not None]
        if not found:
            continue
        estimates = [results.mean(arm) for _, arm in found]
        # Beside one another: most intervals overlap.
        places = [poolings.index(pooling) + 0.05 * (number - 3) for pooling, _ in found]
        means = [100 * estimate.value for estimate in estimates]
        bars = [
            [100 * (estimate.value - estimate.low) for estimate in estimates],
            [100 * (estimate.high - estimate.value) for estimate in estimates],
        ]
        axis.errorbar(places, means, yerr=bars, marker="o", capsize=3, color=colour, linestyle="", label=name)
        # Through the poolings that differ in nothing but the number of tokens.
        alike = [i for i, (pooling, _) in enumerate(found) if pooling.isdigit()]
        line = "--" if name == recipes.BASE else "-"
        axis.plot([places[i] for i in alike], [means[i] for i in alike], color=colour, linestyle=line)
    axis.set_xticks(range(len(poolings)), [pooling.replace(", ", ",\n") for pooling in poolings])
    axis.set_xlabel("tokens an image is pooled to, of 16")
    axis.grid(alpha=0.3)
    axis.set_title("by pooling")
    axis.legend(loc="lower right", fontsize=9)
