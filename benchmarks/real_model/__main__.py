"""Three experiments on a vision-language model and data of yours: ``python -m benchmarks.real_model``.

Accuracy of the model as it is, with a trained adapter, with that disabled, and with LoRA of its size; parameters and
speed of the adapter; and the parts of the paper's fusion. Each arm is a JSON line in OUTPUT; started again, the command
goes on with those that are missing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import torch
from transformers import Trainer, TrainingArguments, set_seed

from benchmarks.digits_vqa.ablation import variants
from benchmarks.digits_vqa.ablation.recipes import LINEAR_PARTS
from emma_adapter import EmmaConfig
from emma_adapter.cli.options import dtype_option, images_option
from emma_adapter.data.examples import Examples
from emma_adapter.data.rows import Rows, open_rows
from emma_adapter.errors import EmmaError
from emma_adapter.models.loading import load_model, load_processor

from . import arms
from .measure import overhead, prompt, questions, right_answers


@click.command(help=__doc__)
@click.option("--model", "source", required=True, help="A folder or a hub id.")
@click.option("--data", required=True, help="What to train on, as emma-adapter finetune reads it.")
@click.option("--eval-data", required=True, help="What to test on, as --data.")
@images_option
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), default=Path("real-model.jsonl"))
@click.option(
    "--fusion", default=EmmaConfig().fusion, show_default=True, help="Of the adapter that is compared with LoRA."
)
@click.option("--instruction-encoder", default="llm", show_default=True, help='"llm", or a text tower.')
@click.option("--steps", type=click.IntRange(min=1), default=500, show_default=True)
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--lr", type=float, default=1e-3, show_default=True, help="Of every arm.")
@click.option("--seed", default=0, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=20, show_default=True, help="Timed pairs of calls.")
@dtype_option
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
def main(
    source: str,
    data: str,
    eval_data: str,
    images: Path | None,
    output: Path,
    fusion: str,
    instruction_encoder: str,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    rounds: int,
    dtype: str,
    device: str,
) -> None:
    variants.register()
    settings = {
        "model": source, "data": data, "eval_data": eval_data, "fusion": fusion, "steps": steps, "seed": seed,
        "instruction_encoder": instruction_encoder, "batch_size": batch_size, "lr": lr, "dtype": dtype,
    }  # fmt: skip
    found = _read(output, settings)
    with _explained():
        processor = load_processor(source)
        train_rows, eval_rows = open_rows(data, "train", images), open_rows(eval_data, "train", images)
        model = load_model(source, dtype).to(device).eval()
        examples = Examples(processor, [processor.tokenizer.eos_token_id])
        places = examples.add(train_rows, data, progress=True)

    def finish(arm: str, **values: Any) -> None:
        found[arm] = {"arm": arm, **settings, **values}
        with output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found[arm]) + "\n")

    def train(trained: Any) -> int:
        arguments = TrainingArguments(
            output_dir=str(output.with_suffix(".trainer")), max_steps=steps, per_device_train_batch_size=batch_size,
            learning_rate=lr, seed=seed, save_strategy="no", report_to=[], remove_unused_columns=False,
            use_cpu=device == "cpu", logging_steps=max(1, steps // 10),
        )  # fmt: skip
        Trainer(trained, arguments, data_collator=examples, train_dataset=places).train()
        return sum(parameter.numel() for parameter in trained.parameters() if parameter.requires_grad)

    def accuracy(of: Any, name: str) -> float:
        right = right_answers(of, processor, eval_rows, name)
        return sum(right) / len(right)

    if "base" not in found:
        finish("base", parameters=0, accuracy=accuracy(model, "base"))
    for arm in arms.names(fusion):
        if arm in found:
            continue
        set_seed(seed)
        if arm == "LoRA":
            with arms.lora(model, found[fusion]["parameters"]) as wrapped:
                parameters = train(wrapped)
                finish(arm, parameters=parameters, accuracy=accuracy(wrapped, arm))
            continue
        with _explained(), arms.adapter(model, processor, arm, instruction_encoder) as handle:
            values: dict[str, Any] = {"parameters": train(model), "accuracy": accuracy(model, arm)}
            with handle.disable_adapter():
                values["accuracy_disabled"] = accuracy(model, f"{arm}, disabled")
            values |= _overheads(model, handle, processor, eval_rows, rounds)
            finish(arm, **values)
    click.echo(_table(found, sum(parameter.numel() for parameter in model.parameters())))


def _overheads(model: Any, handle: Any, processor: Any, rows: Rows, rounds: int) -> dict[str, Any]:
    """Of a forward of one prompt, and of generating an answer of eight tokens."""
    row, turn = questions(rows)[0]
    inputs = prompt(processor, rows, row, turn, next(model.parameters()).device)
    calls = {
        "forward": lambda: model(**inputs),
        "generate": lambda: model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False),
    }
    model.eval()
    with torch.no_grad():
        return {name: overhead(call, handle.disabled, rounds) for name, call in calls.items()}


def _read(path: Path, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The arms that are finished, of these settings."""
    found = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else [], 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise click.ClickException(f"line {number} of {path} is damaged ({error}): remove it") from error
        if {name: record.get(name) for name in settings} == settings:
            found[record["arm"]] = record
    return found


def _table(found: dict[str, dict[str, Any]], model_size: int) -> str:
    """Markdown."""
    lines = ["| arm | accuracy, % | disabled, % | parameters | % of the model | forward, ratio | generate, ratio |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    for arm, record in found.items():
        cells = [
            arm + (" (a part of linear)" if arm in LINEAR_PARTS else ""),
            f"{100 * record['accuracy']:.1f}",
            f"{100 * record['accuracy_disabled']:.1f}" if "accuracy_disabled" in record else "",
            f"{record['parameters']:,}",
            f"{100 * record['parameters'] / model_size:.3f}",
            *(f"{record[name]['ratio']:.3f}" if name in record else "" for name in ("forward", "generate")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except (EmmaError, OSError) as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
