"""``emma-adapter finetune --unified``: train the branch that draws and edits pictures, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .training import checkpoint_to_resume, train, training_arguments

if TYPE_CHECKING:
    from ..data.drawings import Drawings
    from ..unified.config import UnifiedConfig

_AUTOENCODER = "mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers"
#: Learning rates of low-rank copies, which start at zero, and of full ones, which start at the base's weights.
_RATE, _FULL_RATE = 1e-3, 1e-4
#: Number of pictures on which mean and deviation of the latents are measured.
_MEASURED = 256


def train_unified(
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
    autoencoder: str | None,
    size: tuple[int, int] | None,
    rank: Any,
    dtype: str,
    trust_remote_code: bool,
    arguments: tuple[str, ...],
) -> None:
    """Train a model's generation branch on prompts and pictures, and save it; the arguments are the command's options.

    Raises:
        click.UsageError: if they contradict each other.
    """
    from transformers import set_seed

    from ..data.drawings import open_drawings
    from ..models.loading import load_model, load_processor
    from ..unified.attaching import unify_model
    from ..unified.autoencoder import compression_of
    from ..unified.config import UnifiedConfig
    from ..unified.loading import load_unified
    from ..unified.pictures import check_size
    from ..unified.prompts import check_processor

    if adapter is not None and rank is not None:
        raise click.UsageError("--adapter brings its own rank: leave one of the two out")
    start = None if adapter is None else _saved_config(adapter, subfolder)
    config = start or (UnifiedConfig() if rank is None else UnifiedConfig(decoupling=rank))
    settings = _settings(arguments, output, _FULL_RATE if config.decoupling == "full" else _RATE)
    if resumed_from := checkpoint_to_resume(settings):
        adapter, subfolder, start = resumed_from, None, _saved_config(resumed_from)
        if rank is not None and rank != start.decoupling:
            raise click.UsageError(
                f"--rank {rank} differs from that of {resumed_from}, {start.decoupling}: leave it out"
            )
    autoencoder = autoencoder or (None if start else _AUTOENCODER)
    compression = (start and start.compression) or compression_of(autoencoder or _AUTOENCODER)
    if size is not None:
        check_size(*size, compression)

    # All data are checked before minutes of loading.
    processor = load_processor(model, trust_remote_code=trust_remote_code)
    check_processor(processor)
    main_process = settings.process_index == 0
    checks = {"resized": size is not None, "progress": main_process}
    examples = open_drawings(data, split, images)
    eval_examples = None if eval_data is None else open_drawings(eval_data, eval_split, images)
    examples.check(data, processor, compression, mixed=settings.train_batch_size == 1, **checks)
    if eval_examples is not None:
        eval_examples.check(str(eval_data), processor, compression, mixed=settings.eval_batch_size == 1, **checks)

    base = load_model(model, dtype, trust_remote_code=trust_remote_code)
    set_seed(settings.seed)
    if adapter is None:
        unified = unify_model(base, config, processor=processor, autoencoder=str(autoencoder))
    else:
        unified = load_unified(base, adapter, subfolder=subfolder, processor=processor, autoencoder=autoencoder)
    unified.train_only()
    trainer = _trainer(unified, settings, examples, eval_examples, size)
    if start is None:
        # On the device to which Trainer has moved the model.
        unified.measure_latents(_sample(examples, size, progress=main_process))
    result = train(trainer, resumed_from)
    evaluated = {} if eval_examples is None else trainer.evaluate()
    if trainer.is_world_process_zero():
        unified.save_pretrained(output)
        click.echo(f"Trained {unified.num_parameters():,} parameters; mean loss {result.training_loss:.4f}")
        if evaluated:
            click.echo(f"Loss on {eval_data}: {evaluated['eval_loss']:.4f}")
        click.echo(f'Saved to {output}. To use it: emma-adapter draw "..." --model {model} --adapter {output}')


def _settings(arguments: tuple[str, ...], output: Path, learning_rate: float) -> Any:
    from transformers import TrainingArguments

    from ..unified.calls import TARGET

    decided = {"label_names": "the data are read by this command"}
    settings = training_arguments(
        TrainingArguments, arguments, output, decided, learning_rate=learning_rate, logging_steps=10
    )
    settings.label_names, settings.prediction_loss_only = [TARGET], True
    return settings


def _saved_config(source: str, subfolder: str | None = None) -> UnifiedConfig:
    from ..files.hub import local_folder
    from ..unified import checkpoint

    saved, file = checkpoint.describe(
        local_folder(source, (checkpoint.CONFIG_NAME, checkpoint.WEIGHTS_NAME), subfolder=subfolder)
    )
    file.close()
    return saved.config


def _trainer(unified: Any, settings: Any, examples: Any, eval_examples: Any, size: tuple[int, int] | None) -> Any:
    import torch
    from transformers import Trainer

    class _Trainer(Trainer):
        def evaluate(self, *args: Any, **kwargs: Any) -> Any:
            """Evaluate with the same noise and times every time, without changing those of the training."""
            with torch.random.fork_rng():
                torch.manual_seed(self.args.seed)
                return super().evaluate(*args, **kwargs)

    try:
        return _Trainer(
            unified.model,
            settings,
            data_collator=unified.collator(size=size),
            train_dataset=examples,
            eval_dataset=eval_examples,
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def _sample(examples: Drawings, size: tuple[int, int] | None, *, progress: bool) -> Iterator[Any]:
    """Yield targets from all over the data, as the training sees them."""
    count = min(_MEASURED, len(examples))
    with click.progressbar(range(count), label="Measuring latents", hidden=not progress) as places:
        for place in places:
            target = examples[place * len(examples) // count]["target"]
            yield target if size is None else target.resize(size[::-1])
