"""``emma-adapter convert``: make an adapter folder from the authors' checkpoint."""

from __future__ import annotations

from pathlib import Path

import click

#: What the authors' published weights were trained on.
_MODEL = "llava-hf/llava-1.5-7b-hf"
_TEXT_TOWER = "openai/clip-vit-large-patch14-336"


@click.command()
@click.argument("source", metavar="VISION_TOWER.BIN", type=click.Path(path_type=Path))
@click.argument("output", metavar="FOLDER", type=click.Path(path_type=Path))
@click.option("--model", default=_MODEL, show_default=True, help="A LLaVA, hub id or folder; only its config is read.")
@click.option("--text-tower", default=_TEXT_TOWER, show_default=True, help="The CLIP that reads instructions.")
def convert(source: Path, output: Path, model: str, text_tower: str) -> None:
    """Make an adapter folder from the authors' vision_tower.bin."""
    from ..adapter.patch import patch_model
    from ..alignment.module import EmmaAlignment
    from ..checkpoints.model_card import load_call
    from ..errors import CheckpointError, ConfigError, UnsupportedModelError
    from ..models.loading import load_processor, model_without_weights

    official = EmmaAlignment.from_official(source)
    base = model_without_weights(model)
    if base.config.model_type != "llava":
        raise UnsupportedModelError(
            f"{model} is of model_type {base.config.model_type!r}; the authors' weights are for LLaVA-1.5: --model "
            f"{_MODEL}, or another model of type 'llava'"
        )
    try:
        adapter = patch_model(
            base, official.config.replace(instruction_encoder=text_tower), processor=load_processor(model)
        )
    except ConfigError as error:
        config = official.config
        raise CheckpointError(
            f"{source} was trained for {config.num_visual_tokens} visual tokens of {config.visual_dim} channels and "
            f"{config.max_instruction_tokens} instruction tokens of {config.instruction_dim}: give the --model and "
            f"--text-tower it was trained with ({error})"
        ) from error
    adapter.alignment.load_state_dict(official.state_dict())
    adapter.save_pretrained(output)
    click.echo(f"Saved to {output}. To use it: {load_call(str(output), text_tower)}")
