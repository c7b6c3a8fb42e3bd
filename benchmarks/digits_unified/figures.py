"""The figures of the documentation: ``python -m benchmarks.digits_unified.figures``.

Full and low-rank copies, three seeds each, trained from nothing and tested on unseen captions and unseen handwriting. A
finished run is one JSON line of ``results/digits-unified.jsonl``; interrupted, the same command goes on where it
stopped. At the end it writes the table. About three hours on a free core.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from .judge import listed
from .records import add_record, load_records, mean_and_interval
from .runs import STEPS, Drawn, Painter, draw, edit, fit, make_painter

RESULTS = Path(__file__).parents[1] / "results" / "digits-unified.jsonl"
COPIES: tuple[Any, ...] = ("full", 32)
SEEDS = (0, 1, 2)
SCENES = 300

Task = Callable[[Painter, int, int], Drawn]
TASKS: dict[str, Task] = {
    "draw 2x2": lambda painter, n, seed: draw(painter, n, grid=2, seed=seed),
    "draw 3x3": lambda painter, n, seed: draw(painter, n, grid=3, seed=seed),
    "draw 2x2, no places named": lambda painter, n, seed: draw(painter, n, grid=2, seed=seed, places=False),
    "draw 2x2, unseen combinations": lambda painter, n, seed: draw(
        painter, n, grid=2, seed=seed, combinations="held out"
    ),
    "edit 2x2": lambda painter, n, seed: edit(painter, n, grid=2, seed=seed),
    "edit 3x3": lambda painter, n, seed: edit(painter, n, grid=3, seed=seed),
}
#: The lines of the table: task, figure, and the target.
LINES = (
    ("draw 2x2", "digit"),
    ("draw 2x2", "colour"),
    ("draw 2x2", "position"),
    ("draw 2x2", "anywhere"),
    ("draw 2x2", "empty"),
    ("draw 2x2", "whole scene"),
    ("draw 2x2, no places named", "whole scene, anywhere"),
    ("draw 2x2, unseen combinations", "whole scene"),
    ("draw 3x3", "position"),
    ("draw 3x3", "whole scene"),
    ("edit 2x2", "edited cell"),
    ("edit 2x2", "edited, by name"),
    ("edit 2x2", "edited, by place"),
    ("edit 2x2", "other cells kept"),
    ("edit 2x2", "whole scene"),
    ("edit 2x2", "pixel error of other cells"),
    ("edit 3x3", "edited cell"),
    ("edit 3x3", "other cells kept"),
    ("edit 3x3", "pixel error of other cells"),
)


def name_of(copies: Any) -> str:
    return "full copies" if copies == "full" else f"rank {copies}"


def measure(painter: Painter, n: int, seed: int) -> dict[str, dict[str, Any]]:
    return {
        task: {"scores": listed(drawn.scores), "ceiling": listed(drawn.ceiling)}
        for task, run in TASKS.items()
        for drawn in [run(painter, n, seed)]
    }


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: a row a figure; of each kind of copies mean, interval, and what a reconstruction reaches."""
    kinds = list(dict.fromkeys(record["copies"] for record in records))
    rows = [
        ["", "", *(name_of(kind) for kind in kinds), "reconstruction"],
        ["---", "---"] + ["---:"] * (len(kinds) + 1),
    ]
    for task, figure in LINES:
        cells, ceiling = [], None
        for kind in kinds:
            found = [record["figures"][task] for record in records if record["copies"] == kind]
            cells.append(mean_and_interval(np.array([one["scores"][figure] for one in found], dtype=float)))
            ceiling = np.nanmean(np.array([one["ceiling"][figure] for one in found], dtype=float))
        rows.append([task, figure, *cells, f"{ceiling:.3f}"])
    for text, values in (
        ("trained parameters", [f"{_first(records, kind)['parameters']:,}" for kind in kinds]),
        ("training steps", [f"{_first(records, kind)['steps']:,}" for kind in kinds]),
        ("runs", [str(sum(record["copies"] == kind for record in records)) for kind in kinds]),
    ):
        rows.append([text, "", *values, ""])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |\n" for row in rows
    )


def _first(records: list[dict[str, Any]], kind: Any) -> dict[str, Any]:
    return next(record for record in records if record["copies"] == kind)


@click.command(help=__doc__)
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
@click.option("--until", "steps", default=STEPS, show_default=True, help="Training steps.")
@click.option("--scenes", default=SCENES, show_default=True)
@click.option("--only", "only", multiple=True, help='"full copies" or "rank 32".')
def main(results: Path, steps: int, scenes: int, only: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    for seed in SEEDS:
        for copies in COPIES:
            done = [(record["copies"], record["seed"]) for record in load_records(results)]
            if (copies, seed) in done or (only and name_of(copies) not in only):
                continue
            started = time.perf_counter()
            painter = make_painter(copies, seed)
            fit(painter, f"{copies}-{seed}", seed=seed, until=steps)
            seconds = time.perf_counter() - started
            record = {
                "copies": copies,
                "seed": seed,
                "steps": steps,
                "parameters": painter.num_parameters,
                "seconds": round(seconds),
                "figures": measure(painter, scenes, seed),
            }
            add_record(results, record)
    text = table(load_records(results))
    results.with_suffix(".md").write_text(text)
    click.echo(text)


if __name__ == "__main__":
    main()
