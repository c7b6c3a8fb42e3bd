"""What ``finetune`` does whatever it trains: Trainer's arguments, checkpoints to go on from, and the run itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click


def training_arguments(
    kind: Any, arguments: Sequence[str], output: Path, decided: Mapping[str, str], **defaults: Any
) -> Any:
    """Return what the arguments of a command say.

    Args:
        kind: a class of arguments of Trainer's.
        arguments: those that are no options of the command.
        output: the command's; checkpoints go into a folder in it.
        decided: arguments that have no say, and why.
        defaults: in place of the class's.

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
    given = [*arguments, "--output_dir", str(output / "checkpoints")]
    try:
        settings, unknown = parser.parse_args_into_dataclasses(
            given, return_remaining_strings=True, look_for_args_file=False
        )
    except (ValueError, TypeError, ImportError) as error:
        raise click.UsageError(str(error)) from error
    if unknown:
        known = f"{kind.__module__.split('.')[0]}.{kind.__name__}"
        raise click.UsageError(f"{unknown[0]} is no argument of finetune, nor of {known}")
    if settings.learning_rate < 0:
        raise click.UsageError(f"--learning_rate {settings.learning_rate} is below 0")
    settings.remove_unused_columns = False
    return settings


def checkpoint_to_resume(settings: Any) -> str | None:
    """Return the checkpoint that the arguments say to go on from, if any.

    Raises:
        click.UsageError: if it isn't there.
    """
    asked: str | None = settings.resume_from_checkpoint
    if asked is None or asked.lower() == "false":
        return None
    found = _last_checkpoint(settings) if asked.lower() == "true" else asked
    if found is None or not Path(found).is_dir():
        raise click.UsageError(f"there is no checkpoint to resume from at {found or settings.output_dir}")
    return found


def train(trainer: Any, resumed_from: str | None) -> Any:
    """Run the training; if it is interrupted, tell how to go on.

    Raises:
        click.UsageError: if weights are to be sharded.
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
    """The last one that was written to its end, which is Trainer's state."""
    from transformers.trainer import TRAINER_STATE_NAME

    found = [file.parent for file in Path(settings.output_dir).glob(f"checkpoint-*/{TRAINER_STATE_NAME}")]
    numbered = {int(number): folder for folder in found if (number := folder.name.split("-")[1]).isdecimal()}
    return str(numbered[max(numbered)]) if numbered else None
