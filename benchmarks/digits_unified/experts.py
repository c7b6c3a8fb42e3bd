"""A vision expert for bar charts beside a tower that reads digits: ``python -m benchmarks.digits_unified.experts``.

The base has never seen a chart, in which a bar's height is the digit. An expert learns to read them by the answers of
the frozen language model, then the router to tell charts from digits. Three seeds, tested on unseen questions, and of
digits on unseen handwriting. A finished seed is a JSON line of ``results/digits-experts.jsonl``; interrupted, the same
command goes on where it stopped. At the end it writes the table. About ten minutes on a free core.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration

from emma_adapter import EmmaVisionExperts, add_vision_expert

from ..digits_vqa.scenes import EMPTY
from .captions import question
from .make_base import asking, make_batch, say
from .records import add_record, load_records, mean_and_interval
from .scenes import CELL, Scenes, from_cells, render, sample_scenes
from .training import WORK, Optimizer, train
from .vlm import load_base, to_pixel_values

RESULTS = Path(__file__).parents[1] / "results" / "digits-experts.jsonl"
EXPERT = "charts"
SEEDS = (0, 1, 2)
STEPS, ROUTER_STEPS = 400, 60
BATCH = 32
SCENES = 300

_RGB = torch.tensor([[1.0, 0.15, 0.15], [0.15, 0.9, 0.2], [0.25, 0.4, 1.0], [1.0, 0.95, 0.15]])
#: In pixels of a cell: where bars stand, the axis to their left, how high the digit zero is, and each unit more.
_FLOOR, _AXIS, _LEAST, _UNIT = 29, 2, 1.0, 2.7


def render_charts(scenes: Scenes) -> Tensor:
    """Pictures ``[n, 3, H, W]`` in [0, 1], as ``render`` makes, with a bar in the place of each digit."""
    cells = scenes.digits.shape[1]
    drawn = (scenes.digits, scenes.colours, scenes.inks)
    digits, colours, inks = (torch.as_tensor(values.reshape(-1, 1, 1)) for values in drawn)
    left = 6 + ((torch.as_tensor(scenes.hands[..., 0].reshape(-1, 1, 1)) + 0.1) * 30).clamp(0, 12)
    y, x = torch.arange(CELL)[:, None], torch.arange(CELL)[None, :]
    bar = (y >= _FLOOR + 1 - _LEAST - _UNIT * digits) & (y <= _FLOOR) & (x >= left) & (x < left + 10)
    bar = (bar & (digits != EMPTY))[:, None]
    axes = ((y == _FLOOR + 1) & (x >= _AXIS)) | ((x == _AXIS) & (y > 1) & (y <= _FLOOR))
    ground = (torch.as_tensor(scenes.grounds) + 0.35).repeat_interleave(cells, 0)[:, :, None, None]
    picture = torch.where(axes, torch.tensor(0.9), ground.expand(-1, -1, CELL, CELL))
    picture = torch.where(bar, _RGB[colours.flatten().clamp(min=0)][:, :, None, None] * inks[:, None], picture)
    return from_cells((picture * 255).round() / 255, scenes.grid)


Renderer = Callable[[Scenes], Tensor]
KINDS: dict[str, Renderer] = {"digits": render, "charts": render_charts}


def train_expert(experts: EmmaVisionExperts, *, seed: int, steps: int, work: Path | None = WORK) -> None:
    """On questions about charts, by the language model's loss."""
    model: Any = experts.train_only(EXPERT).model

    def loss(step: int, rng: np.random.Generator) -> Tensor:
        scenes = sample_scenes(BATCH, "train", rng)
        talks = [asking(scenes, i, rng, shown=True) for i in range(len(scenes))]
        value: Tensor = model(**make_batch(talks, [True] * len(talks), render_charts(scenes))).loss
        return value

    optimizer = Optimizer(model.emma_experts.of(EXPERT), 2e-3, steps, warm_up=20)
    train(f"expert-{seed}", optimizer, loss, seed=700 + seed, work=work)


def train_router(experts: EmmaVisionExperts, *, seed: int, steps: int = ROUTER_STEPS) -> None:
    """On charts and digits, half each."""
    experts.train_only(router=True)

    def loss(step: int, rng: np.random.Generator) -> Tensor:
        pictures = [kind(sample_scenes(BATCH // 2, "train", rng)) for kind in KINDS.values()]
        pixels, grid = to_pixel_values(torch.cat(pictures))
        labels = ["original"] * (BATCH // 2) + [EXPERT] * (BATCH // 2)
        return experts.router_loss(labels=labels, pixel_values=pixels, image_grid_thw=grid)

    train(f"router-{seed}", Optimizer(experts.parameters(), 1e-2, steps, warm_up=5), loss, seed=800 + seed, work=None)
    experts.unfreeze()


def answered_right(model: Qwen3VLForConditionalGeneration, kind: str, n: int) -> list[int]:
    """Of one question about each of ``n`` pictures."""
    rng = np.random.default_rng(501)
    scenes = sample_scenes(n, "test", rng)
    asked, wanted = zip(
        *(question(*cells, rng) for cells in zip(scenes.digits, scenes.colours, strict=True)), strict=True
    )
    given = say(model, KINDS[kind](scenes), list(asked))
    return [int(one == other) for one, other in zip(given, wanted, strict=True)]


@torch.no_grad()
def visual_tokens(model: Any, pictures: Tensor) -> list[Tensor]:
    pixels, grid = to_pixel_values(pictures)
    return list(model.model.get_image_features(pixels, grid).pooler_output)


def measure(experts: EmmaVisionExperts, n: int) -> dict[str, Any]:
    """What is answered right, what went where, and whether digits beside charts keep every bit."""
    model: Any = experts.model
    rng = np.random.default_rng(502)
    digits, charts = (kind(sample_scenes(n, "test", rng)) for kind in KINDS.values())
    mixed = torch.stack([digits, charts], 1).flatten(0, 1)
    with experts.watched() as report:
        found = visual_tokens(model, mixed)[::2]
    went = [image.expert == EXPERT for image in report.images]
    with experts.routed("original"):
        right = {f"stock, {kind}": answered_right(model, kind, n) for kind in KINDS}
        stock = visual_tokens(model, mixed)[::2]
    right |= {f"routed, {kind}": answered_right(model, kind, n) for kind in KINDS}
    with experts.routed(EXPERT):
        right |= {f"through the expert, {kind}": answered_right(model, kind, n) for kind in KINDS}
    return {
        "right": right,
        "to the expert": {"digits": float(np.mean(went[::2])), "charts": float(np.mean(went[1::2]))},
        "digits with the stock's bits": float(np.mean([torch.equal(*pair) for pair in zip(found, stock, strict=True)])),
    }


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: means of the seeds, with 95 % intervals by a bootstrap over seeds and questions."""
    lines = ["| answers right | digits | bar charts |", "|---|---:|---:|"]
    for name, text in (
        ("stock", "stock model"),
        ("routed", "with the expert, routed"),
        ("through the expert", "all images through the expert: its MLPs trained without a router"),
    ):
        cells = []
        for kind in KINDS:
            values = np.array([record["right"][f"{name}, {kind}"] for record in records], dtype=float)
            cells.append(mean_and_interval(values))
        lines.append(f"| {text} | {' | '.join(cells)} |")
    shares = [np.mean([record["to the expert"][kind] for record in records]) for kind in KINDS]
    lines.append(f"| routed to the expert | {shares[0]:.3f} | {shares[1]:.3f} |")
    same = np.mean([record["digits with the stock's bits"] for record in records])
    lines.append(f"| visual tokens with the stock's bits, in a batch of both | {same:.3f} | |")
    first = records[0]
    asked = len(first["right"]["stock, digits"])
    seeds = "seed" if len(records) == 1 else "seeds"
    told = [
        f"{len(records)} {seeds}, {asked} questions of each kind, {first['steps']} steps of {BATCH} charts.",
        f"The expert and the router have {first['parameters']:,} parameters, the tower {first['tower']:,}.",
    ]
    return "\n".join([*lines, "", *told, ""])


@click.command(help=__doc__)
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
@click.option("--steps", default=STEPS, show_default=True)
@click.option("--scenes", default=SCENES, show_default=True)
@click.option("--work", type=click.Path(path_type=Path), default=WORK, show_default=True)
def main(results: Path, steps: int, scenes: int, work: Path) -> None:
    torch.set_num_threads(1)
    for seed in SEEDS:
        if any(record["seed"] == seed for record in load_records(results)):
            continue
        started = time.perf_counter()
        model = load_base()
        tower = sum(parameter.numel() for parameter in model.model.visual.parameters())
        experts = add_vision_expert(model, EXPERT)
        train_expert(experts, seed=seed, steps=steps, work=work)
        train_router(experts, seed=seed)
        seconds = time.perf_counter() - started
        record = {
            "seed": seed,
            "steps": steps,
            "parameters": experts.num_parameters(),
            "tower": tower,
            "seconds": round(seconds),
            **measure(experts, scenes),
        }
        add_record(results, record)
    text = table(load_records(results))
    results.with_suffix(".md").write_text(text)
    click.echo(text)


if __name__ == "__main__":
    main()
