"""``emma-adapter finetune``: train an adapter or a drawing branch, and nothing else unless asked to."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from .options import dtype_option, images_option, split_option, subfolder_option, trust_option
from .train_alignment import train_alignment
from .train_unified import train_unified

_OF_ALIGNMENT = ("fusion", "place", "instruction_encoder", "instruction_policy", "projector", "projector_lr")
_OF_UNIFIED = ("autoencoder", "rank", "size")


def _size(context: click.Context, option: click.Parameter, value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", value)
    if match is None:
        raise click.BadParameter(f"{value!r} is no size in pixels, as 512x768 (height x width) or 512.")
    return int(match[1]), int(match[2] or match[1])


def _rank(context: click.Context, option: click.Parameter, value: str | None) -> Any:
    if value is None or value == "full":
        return value
    if not value.isdecimal() or int(value) < 1:
        raise click.BadParameter(f'{value!r} is no rank, which is an integer >= 1, or "full".')
    return int(value)


@click.command(
    context_settings={"ignore_unknown_options": True},
    epilog="Every other argument of trl.SFTConfig, which has all of transformers.TrainingArguments, is passed on, with "
    "--unified those of TrainingArguments: "
    "--learning_rate 1e-3 --num_train_epochs 1 --per_device_train_batch_size 8 ...",
)
@click.option("--model", required=True, help="The base model: a folder or a hub id.")
@click.option("--data", required=True, help="A .jsonl or .json file, a saved dataset, or one on the hub.")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Folder for the adapter.")
@click.option("--eval-data", help="As --data; the loss on it is printed at the end.")
@split_option
@click.option("--eval-split", default="train", show_default=True, help="Which split of the --eval-data.")
@images_option
@click.option("--adapter", help="An adapter to start from: a folder or a hub id.")
@subfolder_option
@click.option("--fusion", help='How the instruction enters the visual tokens. Default: "modulation".')
@click.option(
    "--place",
    type=click.Choice(["before_projector", "after_projector"]),
    help='Which tokens are aligned. Default: "before_projector"; of the fusion "moda", "after_projector".',
)
@click.option("--instruction-encoder", help='"llm", or a text tower. Default: "llm", or that of the --adapter.')
@click.option("--instruction-policy", help='Which user turns are the instruction. Default: "last_turn".')
@click.option("--projector", is_flag=True, help="Train the projector too.")
@click.option("--projector-lr", type=click.FloatRange(0), help="Its own learning rate.")
@click.option("--unified", is_flag=True, help="Train the model to draw and edit pictures instead.")
@click.option(
    "--autoencoder",
    help="With --unified: a folder or a hub id. Default: that of the --adapter, or "
    "mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers.",
)
@click.option(
    "--size",
    metavar="HEIGHTxWIDTH",
    callback=_size,
    help="With --unified: resize targets to so many pixels. Default: they have one size already.",
)
@click.option(
    "--rank", metavar="RANK", callback=_rank, help='With --unified: of the copies of layers, or "full". Default: 64.'
)
@dtype_option
@trust_option
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[TRAINER ARGUMENTS]")
def finetune(unified: bool, **settings: Any) -> None:
    """Train an adapter for a vision-language model.

    A row of the data: {"images": ["PATH"], "messages": [{"role": "user", "content": "..."}, {"role": "assistant",
    "content": "..."}]}, or as LLaVA's and other tools'. Trainer's checkpoints go to checkpoints/ in the output folder;
    --resume_from_checkpoint true continues from the last.

    With --unified, a row is {"prompt": "...", "target": "PATH"}, and has "image" too where there is one to edit.
    """
    for name in _OF_ALIGNMENT if unified else _OF_UNIFIED:
        if (value := settings.pop(name)) is not None and value is not False:
            flag = f"--{name.replace('_', '-')}"
            why = "has no effect on drawing: leave it or --unified out" if unified else "needs --unified"
            raise click.UsageError(f"{flag} {why}")
    if settings["subfolder"] is not None and settings["adapter"] is None:
        raise click.UsageError("--subfolder says where an adapter is: name its folder or repository with --adapter")
    (train_unified if unified else train_alignment)(**settings)
