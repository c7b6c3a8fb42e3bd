"""What both kinds of ``finetune`` share: Trainer's arguments, checkpoints to resume from, and the run itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click


def training_arguments(
    kind: Any, arguments: Sequence[str], output: Path, decided: Mapping[str, str], **defaults: Any
) -> Any:
    """Return the Trainer arguments that a command was given.

    Args:
        kind: a class of Trainer arguments.
        arguments: those that aren't options of the command.
        output: the command's output folder; checkpoints go into a folder in it.
        decided: arguments that can't be given, and why.
        defaults: instead of the class's.

    Raises:
        click.UsageError: naming an argument that is unknown, has an impossible value, or is decided here.
    """
    import torch
    from transformers import HfArgumentParser

    class Parser(HfArgumentParser):
        def error(self, message: str) -> Any:
            raise click.UsageError(message)

    decided = {"output_dir": "it is --output", "remove_unused_columns": "the data are read by this command", **decided}
    for argument in arguments:
        name = argument.removeprefix("--").removeprefix("no_").split("=")[0].replace("-", "_")
        if argument.startswith("--") and name in decided:
            raise click.UsageError(f"--{name} can't be given: {decided[name]}")
    parser = Parser(kind, allow_abbrev=False)
    parser.set_defaults(bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(), **defaults)
    command_line = [*arguments, "--output_dir", str(output / "checkpoints")]
    try:
        settings, unknown = parser.parse_args_into_dataclasses(
            command_line, return_remaining_strings=True, look_for_args_file=False
        )
    except (ValueError, TypeError, ImportError) as error:
        raise click.UsageError(str(error)) from error
    if unknown:
        class_name = f"{kind.__module__.split('.')[0]}.{kind.__name__}"
        raise click.UsageError(f"{unknown[0]} is no argument of finetune, nor of {class_name}")
    if settings.learning_rate < 0:
        raise click.UsageError(f"--learning_rate {settings.learning_rate} is below 0")
    settings.remove_unused_columns = False
    return settings


def checkpoint_to_resume(settings: Any) -> str | None:
    """Return the checkpoint to resume from, if any.

    Raises:
        click.UsageError: if it isn't there.
    """
    requested: str | None = settings.resume_from_checkpoint
    if requested is None or requested.lower() == "false":
        return None
    checkpoint = _last_checkpoint(settings) if requested.lower() == "true" else requested
    if checkpoint is None or not Path(checkpoint).is_dir():
        raise click.UsageError(f"there is no checkpoint to resume from at {checkpoint or settings.output_dir}")
    return checkpoint


def train(trainer: Any, resumed_from: str | None) -> Any:
    """Run the training; if it is interrupted, print how to resume it.

    Raises:
        click.UsageError: if the weights would be sharded.
    """
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise click.UsageError("what is trained is saved whole: launch with data parallelism (DDP)")
    try:
        return trainer.train(resume_from_checkpoint=resumed_from)
    except KeyboardInterrupt:
        if trainer.is_world_process_zero():
            last = _last_checkpoint(trainer.args)
            how = (
                "no checkpoint was written yet; --save_steps says how often one is"
                if last is None
                else f"the same command with --resume_from_checkpoint true goes on from {last}"
            )
            click.echo(f"\nStopped at step {trainer.state.global_step}: {how}", err=True)
        raise


def _last_checkpoint(settings: Any) -> str | None:
    """Return the last complete checkpoint; Trainer writes its own state last."""
    from transformers.trainer import TRAINER_STATE_NAME

    folders = [file.parent for file in Path(settings.output_dir).glob(f"checkpoint-*/{TRAINER_STATE_NAME}")]
    numbered = {int(number): folder for folder in folders if (number := folder.name.split("-")[1]).isdecimal()}
    return str(numbered[max(numbered)]) if numbered else None
