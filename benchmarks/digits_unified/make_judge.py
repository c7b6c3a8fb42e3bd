"""Make the shipped judge again from scratch: ``python -m benchmarks.digits_unified.make_judge``. Five minutes."""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from ..digits_vqa.scenes import EMPTY, SPLITS
from .judge import JUDGE_DIR, Judge, labels, load_judge, mean, score_drawings
from .scenes import render, sample_scenes, to_cells
from .training import Optimizer, train

STEPS = 1500
SCENES = 40


def loss(judge: Judge, rng: np.random.Generator) -> Tensor:
    """On varied handwriting, blurred and noisy now and then: drawn cells aren't as crisp as scans."""
    scenes = sample_scenes(SCENES, "train", rng, combinations="all", hand="varied")
    cells = to_cells(render(scenes)).flatten(0, 1)
    if rng.random() < 0.3:
        cells = F.avg_pool2d(F.pad(cells, (1, 1, 1, 1), mode="replicate"), 3, 1)
    cells = cells + torch.randn_like(cells) * rng.uniform(0, 0.06)
    digit, colour = judge(cells)
    digits, colours = labels(scenes)
    return F.cross_entropy(digit, digits, label_smoothing=0.05) + F.cross_entropy(colour, colours, ignore_index=EMPTY)


@click.command(help=__doc__)
@click.option("--output", type=click.Path(path_type=Path), default=JUDGE_DIR, show_default=True)
@click.option("--steps", default=STEPS, show_default=True)
def main(output: Path, steps: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(5)
    judge = Judge()
    train("judge", Optimizer(judge.parameters(), 3e-3, steps), lambda _, rng: loss(judge, rng), seed=5)
    output.mkdir(parents=True, exist_ok=True)
    save_file({name: weight.half() for name, weight in judge.state_dict().items()}, output / "model.safetensors")
    judge = load_judge(output)
    for split in SPLITS:
        scenes = sample_scenes(500, split, np.random.default_rng(9), combinations="all")
        print(split, mean(score_drawings(judge.read(render(scenes)), scenes)))


if __name__ == "__main__":
    main()
