"""How many steps a picture needs, by Euler's and by Heun's rule: ``python -m benchmarks.digits_unified.solvers``.

Of the shipped branch, on unseen captions, instructions and handwriting; a few minutes.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import torch
from transformers import AutoProcessor

from .demo import load_painter
from .make_adapter import ADAPTER_DIR
from .records import mean_and_interval
from .runs import draw, edit
from .vlm import BASE_DIR, load_base

RESULTS = Path(__file__).parents[1] / "results" / "digits-solvers.md"
#: Steps and solver; Heun's rule evaluates each of its steps twice, but for the last.
SETTINGS = (*((steps, "euler") for steps in (2, 5, 10, 20, 50)), *((steps, "heun") for steps in (3, 5, 10, 25)))


@click.command(help=__doc__)
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
@click.option("--scenes", default=300, show_default=True, help="Of each test.")
def main(results: Path, scenes: int) -> None:
    torch.set_num_threads(1)
    painter = load_painter(load_base(), AutoProcessor.from_pretrained(BASE_DIR), ADAPTER_DIR)
    lines = ["| solver | steps | drawn right | edited cell | other cells kept |", "|---|---:|---:|---:|---:|"]
    for steps, solver in SETTINGS:
        drawn = draw(painter, scenes, grid=2, steps=steps, solver=solver).scores["whole scene"]
        edited = edit(painter, scenes, grid=2, steps=steps, solver=solver).scores
        figures = [
            mean_and_interval(np.array([values], dtype=float))
            for values in (drawn, edited["edited cell"], edited["other cells kept"])
        ]
        lines.append(f"| {solver} | {steps} | {' | '.join(figures)} |")
        click.echo(lines[-1])
    results.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
