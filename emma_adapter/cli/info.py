"""``emma-adapter info``: show what an adapter is made of, or what one would cost a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ..messages import plain
from .options import subfolder_option, trust_option


@click.command()
@click.argument("target", metavar="ADAPTER|MODEL")
@subfolder_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@trust_option
def info(target: str, subfolder: str | None, as_json: bool, trust_remote_code: bool) -> None:
    """Show what an adapter is made of, or what one would cost a model.

    Give a folder or a hub id. Of a model only the configuration is read, no weights.
    """
    folder = _adapter_folder(target, subfolder)
    facts = _model_facts(target, trust_remote_code) if folder is None else _adapter_facts(folder)
    click.echo(json.dumps(facts, indent=2) if as_json else _table(facts))


def _adapter_folder(target: str, subfolder: str | None) -> Path | None:
    """Return the folder that holds the adapter; None if the target is a model."""
    from ..checkpoints import hub
    from ..checkpoints.format import CONFIG_NAME, MODEL_CONFIG_NAME, SUBFOLDER
    from ..errors import CheckpointError

    if Path(target).is_file():
        raise CheckpointError(f"{target} is a file: give the folder that it is in")
    folder = hub.local_folder(target, subfolder=subfolder)
    for place in (folder, folder / SUBFOLDER):
        if (place / CONFIG_NAME).is_file():
            return place
    # Of a hub repository only adapter files were asked for, so that a missing config of a model tells nothing.
    if subfolder is not None or (Path(target).is_dir() and not (folder / MODEL_CONFIG_NAME).is_file()):
        raise CheckpointError(
            f"{folder} holds neither an adapter ({CONFIG_NAME}) nor a model (config.json): give the folder "
            "that save_pretrained wrote"
        )
    return None


def _adapter_facts(folder: Path) -> dict[str, Any]:
    from ..checkpoints import reading
    from ..checkpoints.format import WEIGHTS_NAME

    saved = reading.read(folder)
    config = saved.config
    return {
        "kind": "adapter",
        "folder": str(saved.source),
        "base_model": saved.base_model,
        "model_type": saved.model_type,
        "fusion": config.fusion,
        "place": config.place,
        "instruction_encoder": config.instruction_encoder,
        "instruction_policy": config.instruction_policy,
        "reads_turns": saved.reads_turns,
        "visual_tokens": config.num_visual_tokens,
        "visual_grid": config.visual_grid,
        "visual_dim": config.visual_dim,
        "instruction_dim": config.instruction_dim,
        "max_instruction_tokens": config.max_instruction_tokens,
        "parameters": sum(tensor.numel() for tensor in saved.alignment.values()),
        "projector_trained": bool(saved.projector),
        "file_size": (saved.source / WEIGHTS_NAME).stat().st_size,
        "checksum": "right" if saved.intact else "wrong: the file is damaged, download or copy it again",
        "written_by": f"emma_adapter {saved.library_version or ''}".strip(),
    }


def _model_facts(source: str, trust_remote_code: bool) -> dict[str, Any]:
    from ..adapter.patch import patch_model, unpatch_model
    from ..alignment.config import EmmaConfig
    from ..alignment.fusion import fusion_names
    from ..errors import ConfigError, UnsupportedModelError
    from ..models.loading import model_without_weights
    from ..models.registry import find_family

    model = model_without_weights(source, trust_remote_code=trust_remote_code)
    # Checked first, since an unsupported family is an error, and an unsupported fusion isn't.
    find_family(model)
    facts: dict[str, Any] = {
        "kind": "model",
        "model": source,
        "model_type": model.config.model_type,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    adapters: dict[str, Any] = {}
    for fusion in fusion_names():
        config = EmmaConfig.moda() if fusion == "moda" else EmmaConfig(fusion=fusion)
        try:
            adapter = patch_model(model, config)
        except (ConfigError, UnsupportedModelError) as error:
            adapters[fusion] = str(error)
            continue
        config, num_parameters = adapter.config, adapter.num_parameters()
        unpatch_model(model)
        if not config.aligns_projected:
            facts |= {
                "visual_tokens": config.num_visual_tokens,
                "visual_grid": config.visual_grid,
                "visual_dim": config.visual_dim,
            }
        adapters[fusion] = {
            "parameters": num_parameters,
            "share": num_parameters / (num_parameters + facts["parameters"]),
        }
    return {**facts, "adapters": adapters}


def _table(facts: dict[str, Any]) -> str:
    lines = {name: value for name, value in facts.items() if name != "adapters"} | facts.get("adapters", {})
    width = max(map(len, lines))
    return "\n".join(f"{name.replace('_', ' '):<{width}}  {_readable(value)}" for name, value in lines.items())


def _readable(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return f"{value['parameters']:,} parameters, {value['share']:.3%} of the model with it"
    if isinstance(value, tuple):
        return " x ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else "not known" if value is None else plain(str(value))
