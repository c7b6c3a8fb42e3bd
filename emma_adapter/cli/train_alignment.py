"""``emma-adapter finetune``: train an adapter of ``patch_model``, and nothing else unless asked to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .training import checkpoint_to_resume, train, training_arguments

#: Arguments of TRL that can't be given, and why.
_DECIDED_HERE = {
    "max_length": "rows are never cut, since that takes their answers away",
    "packing": "images are not packed",
    "padding_free": "images are not packed",
    "pad_to_multiple_of": "rows are padded to the longest of their batch",
    "completion_only_loss": "the loss is always that of the answers alone",
    "assistant_only_loss": "the loss is always that of the answers alone",
    "dataset_kwargs": "the data are read by this command",
    "dataset_text_field": "the data are read by this command",
    "chat_template_path": "the chat template is the processor's",
    "trust_remote_code": "it is --trust-remote-code",
    "model_init_kwargs": "the model is --model, in --dtype",
}


def train_alignment(
    *,
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
    place: str | None,
    instruction_encoder: str | None,
    instruction_policy: str | None,
    projector: bool,
    projector_lr: float | None,
    dtype: str,
    trust_remote_code: bool,
    arguments: tuple[str, ...],
) -> None:
    """Train the alignment of a model on conversations, and save it; the arguments are the command's options.

    Raises:
        click.UsageError: if they contradict each other.
    """
    chosen: dict[str, Any] = {
        name: value
        for name, value in (("fusion", fusion), ("place", place), ("instruction_policy", instruction_policy))
        if value is not None
    }
    if adapter is not None and chosen:
        raise click.UsageError(f"--adapter brings its own {', '.join(chosen)}: leave one of the two out")
    if projector_lr is not None and not projector:
        raise click.UsageError("--projector-lr needs --projector, which trains the projector")
    settings = _settings(arguments, output)
    resumed_from = checkpoint_to_resume(settings)
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

    # Checked before the training rather than after it.
    check_not_foreign(output)
    config = EmmaConfig.moda(**chosen) if fusion == "moda" else EmmaConfig(**chosen)
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
    result = train(trainer, resumed_from)
    evaluated = {} if eval_examples is None else trainer.evaluate()
    if trainer.is_world_process_zero():
        handle.save_pretrained(output)
        click.echo(f"Trained {handle.num_parameters():,} parameters; mean loss {result.training_loss:.4f}")
        if evaluated:
            click.echo(f"Loss on {eval_data}: {evaluated['eval_loss']:.4f}")
        click.echo(f"Saved to {output}. To use it: {load_call(str(output), handle.config.instruction_encoder)}")


def _settings(arguments: tuple[str, ...], output: Path) -> Any:
    try:
        from trl import SFTConfig
    except ImportError as error:
        raise click.UsageError(f'finetune needs more packages: pip install "emma_adapter[train]" ({error})') from error
    # TRL's default is for whole models.
    settings = training_arguments(SFTConfig, arguments, output, _DECIDED_HERE, learning_rate=1e-3)
    settings.dataset_kwargs = {"skip_prepare_dataset": True}
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
        # The optimizer that the arguments name, with parameter groups of our own.
        kind, options = Trainer.get_optimizer_cls_and_kwargs(settings, handle.model)
        groups = handle.parameter_groups(
            settings.learning_rate, projector_lr=projector_lr, weight_decay=settings.weight_decay
        )
        optimizer = kind(groups, **options)
    try:
        return SFTTrainer(
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
