"""What is worth knowing about an adapter, in words."""

from __future__ import annotations

from ..adapter.handle import EmmaAdapter
from ..modules.wrappers import base_of
from ..patching.state import state_of
from ..patching.trainable_parameters import count_parameters
from ..version import __version__


def facts_of(adapter: EmmaAdapter) -> dict[str, str]:
    """By name, in the order in which they are shown."""
    import torch
    import transformers

    config, base = adapter.config, base_of(adapter.model)
    own, total = count_parameters(adapter.model)
    first = next(base.parameters())
    trained_projector = bool(state_of(base).current.original_projectors)
    size = "any number" if config.num_visual_tokens is None else f"{config.num_visual_tokens:,} an image"
    if config.visual_grid is not None:
        size += f", {config.visual_grid[0]} × {config.visual_grid[1]}"
    return {
        "Model type": str(getattr(base.config, "model_type", "")),
        "Fusion": config.fusion,
        "Instruction encoder": config.instruction_encoder,
        "Instruction": config.instruction_policy.replace("_", " "),
        "Visual tokens": f"{size}, of {config.visual_dim:,} channels",
        "Parameters": f"{own:,}, {own / total:.3%} of the model",
        "Projector": "trained with the adapter" if trained_projector else "as in the base model",
        "Computed on": f"{first.device.type}, {str(first.dtype).removeprefix('torch.')}",
        "Versions": f"emma_adapter {__version__}, torch {torch.__version__}, transformers {transformers.__version__}",
    }
