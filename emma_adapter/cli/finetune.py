"""``emma-adapter finetune``: train an adapter, and nothing else unless told so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .options import dtype_option, images_option, split_option, subfolder_option, trust_option

#: Arguments of TRL's that have no say here, and why.
_DECIDED_HERE = {
    "output_dir": "it is --output",
    "max_length": "rows are never cut, since that takes their answers away",
    "packing": "images are not packed",
    "padding_free": "images are not packed",
    "pad_to_multiple_of": "rows are padded to the longest of their batch",
    "completion_only_loss": "the loss is always that of the answers alone",
    "assistant_only_loss": "the loss is always that of the answers alone",
    "dataset_kwargs": "the data are read by this command",
    "dataset_text_field": "the data are read by this command",
    "remove_unused_columns": "the data are read by this command",
    "chat_template_path": "the chat template is the processor's",
    "trust_remote_code": "it is --trust-remote-code",
    "model_init_kwargs": "the model is --model, in --dtype",
}


@click.command(
    context_settings={"ignore_unknown_options": True},
    epilog="Every other argument of trl.SFTConfig, which has all of transformers.TrainingArguments, is passed on: "
    "--learning_rate 1e-3 --num_train_epochs 1 --per_device_train_batch_size 8 ...",
)
@click.option("--model", required=True, help="The base model: a folder or a hub id.")
@click.option("--data", required=True, help="A .jsonl or .json file, a saved dataset, or one on the hub.")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Folder for the adapter.")
@click.option("--eval-data", help="As --data; the loss on it is told at the end.")
@split_option
@click.option("--eval-split", default="train", show_default=True, help="Which split of the --eval-data.")
@images_option
@click.option("--adapter", help="An adapter to start from: a folder or a hub id.")
@subfolder_option
@click.option("--fusion", help='How the instruction enters the visual tokens. Default: "modulation".')
@click.option("--instruction-encoder", help='"llm", or a text tower. Default: "llm", or that of the --adapter.')
@click.option("--instruction-policy", help='Which user turns are the instruction. Default: "last_turn".')
@click.option("--projector", is_flag=True, help="Train the projector too.")
@click.option("--projector-lr", type=click.FloatRange(0), help="Its own learning rate.")
@dtype_option
@trust_option
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[TRAINER ARGUMENTS]")
def finetune(
    model: str,
    data: str,
    output: Path,
    eval_data: str | None,
    split: str,
    eval_split: str,
    images: Path | None,
    adapter: str | None,
    subfolder: str | None,
    fusion: str | None,
    instruction_encoder: str | None,
    instruction_policy: str | None,
    projector: bool,
    projector_lr: float | None,
    dtype: str,
    trust_remote_code: bool,
    arguments: tuple[str, ...],
) -> None:
    """Train an adapter for a vision-language model.

    A row of the data: {"images": ["PATH"], "messages": [{"role": "user", "content": "..."}, {"role": "assistant",
    "content": "..."}]}, or as LLaVA's and other tools'. Trainer's checkpoints go to checkpoints/ in the output folder;
    --resume_from_checkpoint true continues from the last.
    """
    chosen: dict[str, Any] = {
        name: value
        for name, value in (("fusion", fusion), ("instruction_policy", instruction_policy))
        if value is not None
    }
    if adapter is not None and chosen:
        raise click.UsageError(f"--adapter brings its own {', '.join(chosen)}: leave one of the two out")
    if subfolder is not None and adapter is None:
        raise click.UsageError("--subfolder says where an adapter is: name its folder or repository with --adapter")
    if projector_lr is not None and not projector:
        raise click.UsageError("--projector-lr needs --projector, which trains the projector")
    settings = _training_arguments(arguments, output)
    resumed_from = _resumed_from(settings)
    from transformers import set_seed

    from ..adapter.loading import load_adapter
    from ..adapter.patch import patch_model
    from ..alignment.config import EmmaConfig
    from ..checkpoints.model_card import load_call
    from ..checkpoints.writing import check_not_foreign
    from ..data.examples import Examples
    from ..data.rows import open_rows
    from ..models.loading import load_model, load_processor
    from ..models.prompts import stop_ids

    # Not after the training.
    check_not_foreign(output)
    config = EmmaConfig(**chosen)
    processor = load_processor(model, trust_remote_code=trust_remote_code)
    if getattr(processor, "chat_template", None) is None:
        raise click.UsageError(f"the processor of {model} has no chat template, by which conversations become prompts")
    main_process = settings.process_index == 0
    rows = open_rows(data, split, images)
    eval_rows = None if eval_data is None else open_rows(eval_data, eval_split, images)
    base = load_model(model, dtype, trust_remote_code=trust_remote_code)
    examples = Examples(processor, stop_ids(base, processor.tokenizer))
    train_examples = examples.add(rows, data, progress=main_process)
    eval_examples = None if eval_rows is None else examples.add(eval_rows, str(eval_data), progress=main_process)

    set_seed(settings.seed)
    if adapter is None:
        handle = patch_model(base, config, processor=processor, instruction_encoder=instruction_encoder)
    else:
        handle = load_adapter(
            base, adapter, subfolder=subfolder, processor=processor, instruction_encoder=instruction_encoder
        )
    handle.train_only(projector=projector)
    trainer = _trainer(handle, settings, processor, examples, train_examples, eval_examples, projector_lr)
    result = trainer.train(resume_from_checkpoint=resumed_from)
    evaluated = {} if eval_examples is None else trainer.evaluate()
    if trainer.is_world_process_zero():
        handle.save_pretrained(output)
        click.echo(f"Trained {handle.num_parameters():,} parameters; mean loss {result.training_loss:.4f}")
        if evaluated:
            click.echo(f"Loss on {eval_data}: {evaluated['eval_loss']:.4f}")
        click.echo(f"Saved to {output}. To use it: {load_call(str(output), handle.config.instruction_encoder)}")


def _training_arguments(arguments: tuple[str, ...], output: Path) -> Any:
    """Raises:
    click.ClickException: naming an argument that is unknown, has an impossible value, or is decided here.
    """
    try:
        from transformers import HfArgumentParser
        from trl import SFTConfig
    except ImportError as error:
        raise click.UsageError(f'finetune needs more packages: pip install "emma_adapter[train]" ({error})') from error
    import torch

    class Parser(HfArgumentParser):
        def error(self, message: str) -> Any:
            raise click.UsageError(message)

    for argument in arguments:
        name = argument.removeprefix("--").removeprefix("no_").split("=")[0].replace("-", "_")
        if argument.startswith("--") and name in _DECIDED_HERE:
            raise click.UsageError(f"--{name} can't be given: {_DECIDED_HERE[name]}")
    parser = Parser(SFTConfig, allow_abbrev=False)
    # As TRL has it, but not where there is no bfloat16; its learning rate is for whole models.
    parser.set_defaults(bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(), learning_rate=1e-3)
    given = [*arguments, "--output_dir", str(output / "checkpoints")]
    try:
        settings, unknown = parser.parse_args_into_dataclasses(
            given, return_remaining_strings=True, look_for_args_file=False
        )
    except (ValueError, TypeError, ImportError) as error:
        raise click.UsageError(str(error)) from error
    if unknown:
        raise click.UsageError(f"{unknown[0]} is no argument of finetune, nor of trl.SFTConfig")
    if settings.learning_rate < 0:
        raise click.UsageError(f"--learning_rate {settings.learning_rate} is below 0")
    settings.dataset_kwargs = {"skip_prepare_dataset": True}
    settings.remove_unused_columns = False
    return settings


def _trainer(
    handle: Any,
    settings: Any,
    processor: Any,
    examples: Any,
    train_examples: Any,
    eval_examples: Any,
    projector_lr: float | None,
) -> Any:
    from transformers import Trainer
    from trl import SFTTrainer

    optimizer = None
    if projector_lr is not None:
        # The optimizer that the arguments name, with groups of our own.
        kind, options = Trainer.get_optimizer_cls_and_kwargs(settings, handle.model)
        groups = handle.parameter_groups(
            settings.learning_rate, projector_lr=projector_lr, weight_decay=settings.weight_decay
        )
        optimizer = kind(groups, **options)
    try:
        trainer = SFTTrainer(
            handle.model,
            settings,
            data_collator=examples,
            train_dataset=train_examples,
            eval_dataset=eval_examples,
            processing_class=processor,
            optimizers=(optimizer, None),
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise click.UsageError("the adapter is small and is saved whole: launch with data parallelism (DDP)")
    return trainer


def _resumed_from(settings: Any) -> str | None:
    from transformers.trainer_utils import get_last_checkpoint

    asked: str | None = settings.resume_from_checkpoint
    if asked is None or asked.lower() == "false":
        return None
    found: str | None = asked
    if asked.lower() == "true":
        found = get_last_checkpoint(settings.output_dir) if Path(settings.output_dir).is_dir() else None
    if found is None or not Path(found).is_dir():
        raise click.UsageError(f"there is no checkpoint to resume from at {found or settings.output_dir}")
    return found
