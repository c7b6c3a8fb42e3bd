"""A model that answers learns to draw and to edit: the second half of ``make demo``.

Loads the small Qwen3-VL that ships with the repository and its partly trained generation branch, does the rest of the
training, draws captions and edits pictures in handwriting that were in no training, and lets an independent
classifier read the results. The base's answers stay the same, bit for bit.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor
from transformers import AutoProcessor, Qwen3VLForConditionalGeneration

from emma_adapter import load_unified

from .captions import question
from .judge import mean
from .make_adapter import ADAPTER_DIR, SHIPPED_STEPS
from .make_autoencoder import load_autoencoder
from .make_base import make_inputs
from .pictures import draw_edits, draw_prompts
from .runs import STEPS, Drawn, Painter, Remembering, draw, edit, fit
from .scenes import render, sample_scenes
from .vlm import BASE_DIR, load_base


@click.command(help=__doc__)
@click.option("--until", default=STEPS, show_default=True, help=f"Training steps in all; {SHIPPED_STEPS} are done.")
@click.option("--scenes", default=100, show_default=True, help="Pictures of each kind that are drawn and read.")
@click.option("--seed", default=1, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=Path("demo-output/unified"), show_default=True)
def main(until: int, scenes: int, seed: int, output: Path) -> None:
    # At this width one thread is faster than two.
    torch.set_num_threads(1)
    started = time.perf_counter()
    output.mkdir(parents=True, exist_ok=True)
    model, processor = load_base(), AutoProcessor.from_pretrained(BASE_DIR)
    answers = Answers(model)

    painter = load_painter(model, processor, ADAPTER_DIR)
    click.echo(repr(painter.unified))
    answers.check("with the generation branch")
    fit(painter, "demo", seed=seed, first=SHIPPED_STEPS, until=until, work=None)
    answers.check("after its training")

    drawn = {
        "draw 2x2": draw(painter, scenes, grid=2, seed=seed),
        "draw 3x3": draw(painter, scenes, grid=3, seed=seed),
        "draw 2x2, unseen combinations": draw(painter, scenes, grid=2, combinations="held out", seed=seed),
        "edit 2x2": edit(painter, scenes, grid=2, seed=seed),
        "edit 3x3": edit(painter, scenes, grid=3, seed=seed),
    }
    answers.check("after drawing and editing")

    painter.unified.save_pretrained(output / "adapter")
    fresh = load_painter(load_base(), processor, output / "adapter")
    again = draw(fresh, 4, grid=2, seed=seed).pictures
    if not torch.equal(again, draw(painter, 4, grid=2, seed=seed).pictures):
        raise click.ClickException("the reloaded generation branch draws differently")
    size = sum(file.stat().st_size for file in (output / "adapter").iterdir())
    click.echo(
        f"Saved {size / 1e6:.1f} MB to {output / 'adapter'}; loaded into a fresh model it draws the same pictures."
    )

    draw_prompts([drawn["draw 2x2"], drawn["draw 3x3"]], output / "drawings.png")
    draw_edits([drawn["edit 2x2"], drawn["edit 3x3"]], output / "edits.png")
    records = [
        {"task": task, "seed": seed, "figures": mean(one.scores), "reconstruction": mean(one.ceiling)}
        for task, one in drawn.items()
    ]
    (output / "results.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    table = figure_table(drawn)
    (output / "table.md").write_text(table)
    click.echo(
        f"\nWhat the classifier reads, of {scenes} pictures each: unseen captions, unseen handwriting\n\n{table}"
    )
    click.echo(f"Pictures, table and records are in {output}/. Took {time.perf_counter() - started:.0f} s.")


class Answers:
    """What a model answers to questions about pictures, and whether that is still the same, bit for bit."""

    def __init__(self, model: Qwen3VLForConditionalGeneration, n: int = 32) -> None:
        self.model = model
        rng = np.random.default_rng(403)
        scenes = sample_scenes(n, "test", rng)
        asked = [question(scenes.digits[i], scenes.colours[i], rng)[0] for i in range(n)]
        self.inputs = make_inputs(asked, render(scenes))
        self.before = self._now()

    @torch.no_grad()
    def _now(self) -> tuple[Tensor, Tensor]:
        logits = self.model(**self.inputs).logits
        return logits, self.model.generate(**self.inputs, max_new_tokens=8, do_sample=False)

    def check(self, when: str) -> None:
        logits, tokens = self._now()
        if not (torch.equal(logits, self.before[0]) and torch.equal(tokens, self.before[1])):
            raise click.ClickException(f"the base model answers differently {when}")
        click.echo(f"The base model's logits and answers {when}: the same bits.")


def load_painter(model: Qwen3VLForConditionalGeneration, processor: object, folder: Path) -> Painter:
    autoencoder = Remembering(load_autoencoder())
    unified = load_unified(model, folder, processor=processor, autoencoder=autoencoder)
    unified.set_progress_bar_config(disable=True)
    unified.train_only()
    return Painter(model, processor, unified)


def figure_table(drawn: dict[str, Drawn]) -> str:
    """Markdown: a row a figure, of the pictures and of the wanted ones' reconstructions."""
    rows = [["", "", "drawn", "reconstruction"], ["---", "---", "---:", "---:"]]
    for task, one in drawn.items():
        figures, ceiling = mean(one.scores), mean(one.ceiling)
        rows += [
            [task if i == 0 else "", name, f"{value:.3f}", f"{ceiling[name]:.3f}"]
            for i, (name, value) in enumerate(figures.items())
        ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |\n" for row in rows
    )


if __name__ == "__main__":
    main()
