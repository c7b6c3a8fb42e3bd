"""Make the shipped generation branch again from scratch: ``python -m benchmarks.digits_unified.make_adapter``.

It is trained partly: the demo does the rest of the same schedule. About half an hour.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch

from .judge import mean
from .runs import STEPS, draw, edit, fit, make_painter
from .scenes import GRIDS

ADAPTER_DIR = Path(__file__).parent / "adapter"
#: Where the shipped branch was stopped, of ``STEPS``.
SHIPPED_STEPS = STEPS - 300


@click.command(help=__doc__)
@click.option("--output", type=click.Path(path_type=Path), default=ADAPTER_DIR, show_default=True)
@click.option("--until", default=SHIPPED_STEPS, show_default=True, help=f"Steps that are done here, of {STEPS}.")
@click.option("--seed", default=2, show_default=True, help="Of three, the one that was best on the validation split.")
def main(output: Path, until: int, seed: int) -> None:
    torch.set_num_threads(1)
    painter = make_painter("full", seed)
    fit(painter, f"full-{seed}", seed=seed, until=until)
    # The file says which base it is for: not where this checkout is. Half precision halves it.
    painter.model.config._name_or_path = "benchmarks/digits_unified/base"
    branch: Any = painter.model.emma_unified
    branch.half()
    painter.unified.save_pretrained(output)
    branch.float()
    for grid in GRIDS:
        for name, task in (("draws", draw), ("edits", edit)):
            print(f"{name}, grid {grid}, validation:", mean(task(painter, 100, grid=grid, split="validation").scores))


if __name__ == "__main__":
    main()
