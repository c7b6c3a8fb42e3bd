"""Facts about an adapter, or about what draws, in words."""

from __future__ import annotations

from torch import nn

from ..adapter.handle import EmmaAdapter
from ..experts.handle import EmmaVisionExperts
from ..modules.wrappers import base_of
from ..patching.state import state_of
from ..patching.trainable_parameters import count_parameters
from ..unified.handle import EmmaUnified
from ..unified.module import shared_layers
from ..unified.state import unified_state
from ..version import __version__


def facts_of(adapter: EmmaAdapter) -> dict[str, str]:
    """Return facts about an adapter by name, in the order in which they are shown."""
    config, base = adapter.config, base_of(adapter.model)
    added, total = count_parameters(adapter.model)
    trained_projector = bool(state_of(base).current.own_projectors())
    size = "any number" if config.num_visual_tokens is None else f"{config.num_visual_tokens:,} an image"
    if config.visual_grid is not None:
        size += f", {config.visual_grid[0]} × {config.visual_grid[1]}"
    return {
        "Model type": str(getattr(base.config, "model_type", "")),
        "Fusion": f"{config.fusion}, {config.place.replace('_', ' the ')}",
        "Instruction encoder": config.instruction_encoder,
        "Instruction": config.instruction_policy.replace("_", " "),
        "Visual tokens": f"{size}, of {config.visual_dim:,} channels",
        "Parameters": f"{added:,}, {added / total:.3%} of the model",
        "Projector": "trained with the adapter" if trained_projector else "as in the base model",
        **_environment_facts(base),
    }


def facts_of_drawing(unified: EmmaUnified, experts: EmmaVisionExperts | None) -> dict[str, str]:
    """Return facts about what draws and about any vision experts, by name, in the order in which they are shown."""
    state, config = unified_state(unified.model), unified.config
    layers = len(state.module.layers)
    added, total = unified.num_parameters(), sum(parameter.numel() for parameter in unified.model.parameters())
    copies = "full copies" if config.decoupling == "full" else f"copies of rank {config.decoupling}"
    facts = {
        "Model type": str(getattr(unified.model.config, "model_type", "")),
        "Autoencoder": f"{state.coder.source or type(state.coder.module).__name__}, {config.compression} pixels a "
        f"latent, {config.latent_channels} channels",
        "Decoupling": f"{copies}; the first {shared_layers(config, layers)} of {layers} layers share queries and keys",
        "Parameters": f"{added:,}, {added / total:.3%} of the model",
        "Time shift": f"{config.time_shift:g}",
    }
    if experts is not None:
        facts["Vision experts"] = f"{', '.join(experts.names)}; margin {experts.margin:g}"
    return facts | _environment_facts(unified.model)


def _environment_facts(model: nn.Module) -> dict[str, str]:
    import torch
    import transformers

    first = next(model.parameters())
    return {
        "Computed on": f"{first.device.type}, {str(first.dtype).removeprefix('torch.')}",
        "Versions": f"emma_adapter {__version__}, torch {torch.__version__}, transformers {transformers.__version__}",
    }
