"""The whole story on real handwritten digits: ``make demo``.

Loads the small LLaVA that ships with the repository, patches it, fine-tunes the adapter alone, and compares it
on unseen handwriting with the base model, with an adapter that is told the wrong instructions, and with LoRA of the
same size; then both together with LoRA of their total size. Saves the adapter, loads it into a fresh model, and draws
what changed.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click
import torch
from PIL import Image
from transformers import AutoProcessor

from emma_adapter import get_adapter, load_adapter

from . import arms
from .pictures import draw_answers, draw_maps
from .questions import QUESTION_TYPES
from .runs import QuestionSet, Result, answer, make_data, run
from .vlm import BASE_DIR, TEXT_TOWER_DIR


@click.command(help=__doc__)
@click.option("--fusion", type=click.Choice(sorted(arms.LEARNING_RATES)), default="modulation", show_default=True)
@click.option("--instruction-encoder", default=str(TEXT_TOWER_DIR), help='A text tower, or "llm".')
@click.option("--steps", default=700, show_default=True, help="Training steps of each arm.")
@click.option("--batch-size", default=32, show_default=True)
@click.option("--train-scenes", default=12_000, show_default=True)
@click.option("--test-scenes", default=500, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=Path("demo-output"), show_default=True)
def main(
    fusion: str,
    instruction_encoder: str,
    steps: int,
    batch_size: int,
    train_scenes: int,
    test_scenes: int,
    seed: int,
    output: Path,
) -> None:
    # At this width one thread is faster than two.
    torch.set_num_threads(1)
    started = time.perf_counter()
    output.mkdir(parents=True, exist_ok=True)
    processor = AutoProcessor.from_pretrained(BASE_DIR)
    data = make_data(processor, train_scenes=train_scenes, test_scenes=test_scenes, pairs=test_scenes, split="test")
    click.echo(
        f"{len(data.train.questions):,} questions to train on, {len(data.test.questions):,} to test with; "
        "no handwriting is in both."
    )
    results: list[Result] = []

    def compare(builder: arms.Builder) -> arms.Arm:
        torch.manual_seed(seed)
        arm = builder(arms.load_base(), processor)
        results.append(run(arm, data, processor, steps=steps, batch_size=batch_size, seed=seed))
        return arm

    emma = arms.emma(fusion, instruction_encoder)
    compare(arms.base)
    trained = compare(emma)
    adapter = get_adapter(trained.model)
    click.echo(repr(adapter))
    compare(arms.shuffled(emma))
    of_its_size, of_both_sizes = (
        arms.lora(arms.lora_of_size(arms.load_base(), multiple * trained.num_parameters)) for multiple in (1, 2)
    )
    compare(of_its_size)
    compare(arms.together(emma, of_its_size))
    compare(of_both_sizes)

    adapter.save_pretrained(output / "adapter")
    fresh = arms.load_base()
    load_adapter(fresh, output / "adapter", processor=processor, instruction_encoder=instruction_encoder)
    again = answer(arms.Arm("reloaded", fresh, [], 0.0), data.test, processor)
    if again != results[1].answers:
        raise click.ClickException("the reloaded adapter answers differently")
    size = sum(file.stat().st_size for file in (output / "adapter").iterdir())
    click.echo(
        f"Saved {size / 1e3:.0f} kB to {output / 'adapter'}; loaded into a fresh model it gives the same answers."
    )

    save_for_report(data.test, processor, output)
    draw_answers(data.test, results[0].answers, results[1].answers, output / "answers.png", seed=seed)
    draw_maps(adapter, data.test, processor, output / "maps.png")
    (output / "results.jsonl").write_text("".join(json.dumps(result.record()) + "\n" for result in results))
    table = accuracy_table(results)
    (output / "table.md").write_text(table)
    click.echo(f"\nAccuracy on unseen handwriting, %\n\n{table}")
    click.echo(f"Pictures, table and records are in {output}/. Took {time.perf_counter() - started:.0f} s.")
    click.echo(
        f"What the adapter does, on one page:\n\n  emma-adapter report --model {output / 'base'} --trust-remote-code "
        f"--adapter {output / 'adapter'} --data {output / 'questions'} --limit 1000 --output {output / 'report.html'}\n"
    )


def save_for_report(test: QuestionSet, processor: Any, output: Path) -> None:
    """The base model with its code, and the test questions with their pictures, for ``emma-adapter report``."""
    model = arms.load_base()
    type(model).register_for_auto_class("AutoModelForImageTextToText")
    model.save_pretrained(output / "base")
    processor.save_pretrained(output / "base")
    folder = output / "questions"
    folder.mkdir(exist_ok=True)
    for number, picture in enumerate(test.pictures):
        Image.fromarray(picture).save(folder / f"{number}.png")
    rows = [
        {"image": f"{one.scene}.png", "question": one.text, "answer": one.answer, "attribute": one.type}
        for one in test.questions
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def accuracy_table(results: list[Result]) -> str:
    """Markdown: a row per question type, a column per arm, per cent."""
    rows = [["", *(result.arm for result in results)], ["---"] + ["---:"] * len(results)]
    rows += [[type, *(f"{100 * result.accuracy[type]:.1f}" for result in results)] for type in QUESTION_TYPES]
    rows.append(["**mean**", *(f"**{100 * result.mean:.1f}**" for result in results)])
    rows.append(["pairs, both right", *(f"{100 * result.pairs:.1f}" for result in results)])
    rows.append(["trained parameters", *(f"{result.parameters:,}" for result in results)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |\n" for row in rows
    )


if __name__ == "__main__":
    main()
