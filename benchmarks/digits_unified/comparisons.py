"""What the paper leaves open, compared: ``python -m benchmarks.digits_unified.comparisons``.

How a reference picture reaches the prompt, how many layers share their queries and keys, full copies against ranks, the
density of training times, the scales of guidance, and "describe, then draw". Each arm is trained from nothing on 2x2
scenes, with the same three rates on the first seed, of which the one with the least loss on validation scenes trains
the other seeds; the tests are unseen captions, instructions and handwriting. A finished run is a JSON line of
``results/digits-comparisons.jsonl``; interrupted, the same command goes on where it stopped. At the end it writes
the tables and a figure. About two hours on two cores.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import click
import numpy as np
import torch
from torch import Tensor

from .captions import DESCRIBE, DRAW, sample_edits
from .comparisons_figure import draw_figure
from .comparisons_table import COLUMNS, write_tables
from .judge import listed, load_judge, score_edits
from .make_autoencoder import reconstruct
from .make_base import say
from .records import add_record, load_records
from .runs import Drawn, Painter, Phase, draw, edit, fit, generate, loss, make_painter
from .scenes import render, sample_scenes
from .training import WORK

RESULTS = Path(__file__).parents[1] / "results" / "digits-comparisons.jsonl"
SEEDS = (0, 1, 2)
RATES = (7e-3, 1.2e-2, 2e-2)
STEPS = 1200
SCENES = 300
VALIDATION_BATCHES = 20

Reference = Literal["by channel", "by token", "visual tokens only", "latents only"]


@dataclass(frozen=True)
class Arm:
    name: str
    copies: Any = "full"
    reference: Reference = "by channel"
    #: Of the branch's config.
    changes: dict[str, Any] = field(default_factory=dict)


#: What the others are compared with: full copies, half of the layers shared, latents by channel, uniform times.
DEFAULT = "default"
ARMS = (
    Arm(DEFAULT),
    Arm("reference by token", reference="by token"),
    Arm("reference: visual tokens only", reference="visual tokens only"),
    Arm("reference: latents only", reference="latents only"),
    Arm("no layer shared", changes={"shared_layers": 0}),
    Arm("all layers shared", changes={"shared_layers": 4}),
    Arm("rank 4", copies=4),
    Arm("rank 16", copies=16),
    Arm("rank 64", copies=64),
    Arm("logit-normal times", changes={"timestep_density": "logit_normal"}),
    Arm("logit-normal times, shifted by 3", changes={"timestep_density": "logit_normal", "time_shift": 3.0}),
    Arm("changed latents weigh as all", changes={"changed_weight": 1.0}),
)

#: Scales of guidance: of drawings; of edits, for text and for pictures.
DRAWING_SCALES = (1.0, 2.0, 3.0, 5.0)
EDITING_SCALES = ((1.0, 1.0), (2.0, 1.5), (3.0, 1.0), (3.0, 2.0), (3.0, 3.0), (5.0, 2.0))


def phase(rate: float, steps: int) -> Phase:
    return Phase("comparison", steps, steps, rate, drawing_only=0.25, editing=0.7, large=0.0)


def make(arm: Arm, seed: int) -> Painter:
    """The arm's branch at its start."""
    painter = make_painter(arm.copies, seed, **arm.changes)
    branches: Any = painter.model.emma_unified
    module = branches.default
    weights: dict[str, Tensor] = dict(module.fusion.items())
    if arm.reference == "by token":
        # Each picture is in the prompt twice: as visual tokens, and as latents.
        painter.repeats = 2
    if arm.reference != "by channel":
        for name, weight in weights.items():
            weight.requires_grad_(name == "latents" and arm.reference != "visual tokens only")
        module.fuse = _fuse(arm.reference, weights["latents"])
    return painter


def _fuse(reference: Reference, weight: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """What stands in the prompt at reference pictures, in place of u + dW u + W_g g."""

    def fuse(visual: Tensor, latents: Tensor) -> Tensor:
        own = latents @ weight.mT
        if reference == "visual tokens only":
            return visual
        if reference == "latents only":
            return own
        # All pictures are of one size.
        pictures = visual.view(-1, 2, _TOKENS, visual.shape[-1])
        return torch.stack([pictures[:, 0], own.view_as(pictures)[:, 1]], 1).view_as(visual)

    return fuse


#: Of a 2x2 picture.
_TOKENS = 4


@torch.no_grad()
def validation_loss(painter: Painter) -> float:
    """The loss of the same validation scenes, instructions, times and noise for all rates of an arm."""
    values = []
    for step in range(VALIDATION_BATCHES):
        torch.manual_seed(step)
        of = Phase("validation", 1, 1, 0.0, drawing_only=0.0, editing=0.7, large=0.0)
        values.append(loss(painter, of, step, np.random.default_rng((9, step)), split="validation").item())
    return float(np.mean(values))


def described_then_drawn(painter: Painter, n: int, *, seed: int) -> Drawn:
    """Edits by words alone: the base says what the instruction makes of the picture, and that is drawn."""
    rng = np.random.default_rng(402)
    edits = sample_edits(sample_scenes(n, "test", rng), "test", rng)
    asked = [f"{instruction} then {DESCRIBE}" for instruction in edits.instructions]
    prompts = [f"{DRAW} {said}" for said in say(painter.model, render(edits.before), asked)]
    pictures = generate(painter, prompts, grid=2, seed=seed)
    judge, ideal = load_judge(), reconstruct(render(edits.after))
    scores, ceiling = (score_edits(judge.read(seen), edits, seen, ideal) for seen in (pictures, ideal))
    return Drawn(prompts, edits.after, pictures, ideal, scores, ceiling, edits)


def measure(painter: Painter, arm: Arm, n: int, seed: int) -> dict[str, Any]:
    drawn, edited = partial(draw, painter, n, grid=2, seed=seed), partial(edit, painter, n, grid=2, seed=seed)
    tasks: dict[str, Callable[[], Drawn]] = {"draw": drawn, "edit": edited}
    if arm.name == DEFAULT:
        tasks["describe, then draw"] = partial(described_then_drawn, painter, n, seed=seed)
        for scale in DRAWING_SCALES:
            tasks[f"draw at {scale:g}"] = partial(drawn, guidance=scale)
        for text, image in EDITING_SCALES:
            tasks[f"edit at {text:g}, {image:g}"] = partial(edited, guidance=text, image_guidance=image)
    return {name: _kept(listed(task().scores)) for name, task in tasks.items()}


def _kept(scores: dict[str, list[float | None]]) -> dict[str, list[float | None]]:
    """Return the figures that tables are made of: a file of all scenes' figures would be three times as large."""
    wanted = {figure for _, figure in COLUMNS.values()}
    return {name: values for name, values in scores.items() if name in wanted}


def run(arm: Arm, rate: float, seed: int, steps: int, scenes: int, work: Path) -> dict[str, Any]:
    """Train and test one run, and return its record."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    painter = make(arm, seed)
    fit(painter, f"{arm.name}, {rate:g}, {seed}", seed=seed, phases=[phase(rate, steps)], work=work)
    seconds = time.perf_counter() - started
    return {
        "arm": arm.name,
        "rate": rate,
        "seed": seed,
        "steps": steps,
        "parameters": painter.num_parameters,
        "picture tokens": _TOKENS * painter.repeats,
        "seconds": round(seconds),
        "validation loss": validation_loss(painter),
        "figures": measure(painter, arm, scenes, seed),
    }


Job = tuple[Arm, float, int]


def best_rate(records: Iterable[dict[str, Any]], arm: Arm) -> float | None:
    """The rate with the least validation loss on the first seed, once all were tried."""
    tried = {r["rate"]: r["validation loss"] for r in records if r["arm"] == arm.name and r["seed"] == SEEDS[0]}
    return min(tried, key=tried.__getitem__) if tried.keys() >= set(RATES) else None


def pending(records: list[dict[str, Any]], arms: Iterable[Arm]) -> list[Job]:
    """The runs that can begin now: all rates of the first seed, then the best one's other seeds."""
    done = {(record["arm"], record["rate"], record["seed"]) for record in records}
    jobs: list[Job] = []
    for arm in arms:
        best = best_rate(records, arm)
        wanted = [(rate, SEEDS[0]) for rate in RATES] if best is None else [(best, seed) for seed in SEEDS[1:]]
        jobs += [(arm, rate, seed) for rate, seed in wanted if (arm.name, rate, seed) not in done]
    return jobs


@click.command(help=__doc__)
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
@click.option("--work", type=click.Path(path_type=Path), default=WORK, show_default=True)
@click.option("--workers", type=click.IntRange(min=1), default=2, show_default=True, help="Processes of one thread.")
@click.option("--steps", default=STEPS, show_default=True, help="Of each run.")
@click.option("--scenes", default=SCENES, show_default=True, help="Of each test.")
@click.option("--only", multiple=True, type=click.Choice([arm.name for arm in ARMS]), help="Repeatable.")
def main(results: Path, work: Path, workers: int, steps: int, scenes: int, only: tuple[str, ...]) -> None:
    arms = [arm for arm in ARMS if not only or arm.name in only]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        while jobs := pending(load_records(results), arms):
            click.echo(f"{len(jobs)} runs")
            for finished in as_completed([pool.submit(run, *job, steps, scenes, work) for job in jobs]):
                add_record(results, finished.result())
    records = load_records(results)
    best = {arm.name: best_rate(records, arm) for arm in arms}
    chosen = [r for arm in arms for r in records if r["arm"] == arm.name and r["rate"] == best[arm.name]]
    click.echo(write_tables(chosen, results.with_suffix(".md"), DEFAULT))
    draw_figure(chosen, DEFAULT, results.with_suffix(".png"))


if __name__ == "__main__":
    main()
