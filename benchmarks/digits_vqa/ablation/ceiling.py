"""What limits a base model that loses nothing: ``python -m benchmarks.digits_vqa.ablation.ceiling``.

Trains a base checkpoint that keeps all 16 tokens with language models of two and of four layers until they stop getting
better, and prints what they answer on unseen handwriting. The study of the same --work and --base-steps uses them.
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import numpy as np
import torch

from ..questions import QUESTION_TYPES
from . import bases
from .plan import Base, Towers
from .settings import TrainedOutBases
from .summary import UNPOOLED, table

_DEFAULTS = TrainedOutBases()


@click.command(help=__doc__)
@click.option(
    "--base", type=click.IntRange(min=0), default=0, show_default=True, help="Its seed; 0 has shipped towers."
)
@click.option("--layers", type=click.IntRange(min=1), multiple=True, default=(2, 4), show_default=True)
@click.option("--base-steps", type=click.IntRange(min=1), default=_DEFAULTS.base_steps, show_default=True)
@click.option("--decay-steps", type=click.IntRange(min=1), default=_DEFAULTS.decay_steps, show_default=True)
@click.option(
    "--work", type=click.Path(path_type=Path, file_okay=False), default=Path("ablation-work"), show_default=True
)
def main(base: int, layers: tuple[int, ...], base_steps: int, decay_steps: int, work: Path) -> None:
    # At this width one thread is faster than two.
    torch.set_num_threads(1)
    trained = {}
    for number in layers:
        settings = TrainedOutBases(base_steps=base_steps, decay_steps=decay_steps, language_layers=number)
        for job in (Towers(base), Base(base, UNPOOLED)):
            bases.make(job, settings, work)
        trained[number] = json.loads((bases.folder(job, settings, work) / bases.TRAINING).read_text())
    accuracy = {number: found["validation_accuracy"] for number, found in trained.items()}
    rows = [[type, *(f"{100 * found[type]:.1f}" for found in accuracy.values())] for type in QUESTION_TYPES]
    rows.append(["**mean**", *(f"{100 * np.mean(list(found.values())):.1f}" for found in accuracy.values())])
    rows.append(["validation loss", *(f"{found['validation_loss']:.4f}" for found in trained.values())])
    for name in ("best_step", "steps_at_constant_rate"):
        rows.append([name.replace("_", " "), *(f"{found[name]:,}" for found in trained.values())])
    click.echo(table(["", *(f"{number} layers" for number in layers)], rows))


if __name__ == "__main__":
    main()
