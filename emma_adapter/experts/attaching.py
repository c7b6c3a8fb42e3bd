"""add_vision_expert, and putting experts on a model."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from ..errors import ConfigError, PatchError
from ..models.registry import find_family, require_model
from ..modules import omni, private, sharding, wrappers
from ..modules.torch_modes import undisturbed
from ..modules.trainability import is_trained
from ..modules.wrappers import base_of
from . import base_saves, hooks
from .config import DEFAULT_LAYERS, DEFAULT_MARGIN, VisionExpertsConfig
from .handle import EmmaVisionExperts
from .module import VisionExperts
from .state import MODULE_NAME, STATE_ATTRIBUTE, ExpertsState
from .tower import base_parameters, routed_blocks, token_width, used_blocks


@undisturbed()
def add_vision_expert(
    model: nn.Module, name: str, layers: int | None = None, *, margin: float | None = None
) -> EmmaVisionExperts:
    """Add an expert to a model's vision tower, in place: copies of the MLPs of its last blocks, and a router.

    The router sends each whole image to one expert or leaves it to the original MLPs, to which all images go at the
    start. What the original computes has the same bits as before, even beside images that an expert takes. All tiles
    that the model cuts an image into go together, as far as the model's call tells; so do all frames of a video, where
    the model takes it as a video.

    Args:
        model: a transformers model of a supported family, or a ``PeftModel`` around one.
        name: of the expert, such as ``"stem"``; ``"original"`` stands for the original MLPs.
        layers: how many blocks, the last ones whose output reaches the language model; the same for all experts of a
            model. Default: those of the other experts, or 5, or all if there are fewer.
        margin: an expert takes an image only if its probability exceeds the original's by more than this; one number
            for all experts of a model. Default: the present margin, at first 0.2.

    Raises:
        UnsupportedModelError: if the family or the kind of vision tower is unknown, or the tower is quantized.
        ConfigError: if a name, number or margin is not allowed.
        PatchError: if the model is wrapped for several processes, or the tower sharded or offloaded.
    """
    around, model = wrappers.around(model), wrappable(model)
    state = model.__dict__.get(STATE_ATTRIBUTE)
    earlier_config = state.config if isinstance(state, ExpertsState) else None
    if earlier_config is None:
        family = find_family(model)
        blocks = used_blocks(model, family.inner(model))
        config = VisionExpertsConfig(
            experts=(name,),
            layers=min(DEFAULT_LAYERS, len(blocks)) if layers is None else layers,
            margin=DEFAULT_MARGIN if margin is None else margin,
        )
        attach(model, config)
        omni.guard_wrappers(around)
        return EmmaVisionExperts(model)
    if layers not in (None, earlier_config.layers):
        raise ConfigError(
            f"the model's experts {list(earlier_config.experts)} are in its last {earlier_config.layers} blocks, and "
            f"all share a router, so that layers={layers} is not possible: leave it out, or "
            "EmmaVisionExperts(model).remove() first"
        )
    assert isinstance(state, ExpertsState)
    names = (*earlier_config.experts, name)
    config = earlier_config.replace(experts=names, margin=earlier_config.margin if margin is None else margin)
    mlps, width = mlp_parameters(model, state)
    state.module.add(name, mlps, width)
    state.config = config
    return EmmaVisionExperts(model)


def wrappable(model: nn.Module) -> nn.Module:
    """Return the transformers model that experts can be added to.

    Raises:
        PatchError: if a wrapper around it would never learn of new parameters.
    """
    require_model(model)
    if any(map(wrappers.knows_its_parameters, wrappers.around(model))) or sharding.is_fully_sharded(model):
        raise PatchError(
            "the model is wrapped in DistributedDataParallel, DeepSpeed's engine or AveragedModel, or sharded by FSDP, "
            "which would never learn of the experts' parameters: add or load experts first, then wrap"
        )
    return base_of(model)


def attach(model: nn.Module, config: VisionExpertsConfig) -> ExpertsState:
    """Put experts on a model that has none, and return their state."""
    family = find_family(model)
    inner = family.inner(model)
    state = ExpertsState(family, config, VisionExperts().train(model.training))
    state.has_feature_methods = bool(state.feature_methods(inner))
    mlps, width = mlp_parameters(model, state)
    for name in config.experts:
        state.module.add(name, mlps, width)
    model.__dict__[STATE_ATTRIBUTE] = state
    model.add_module(MODULE_NAME, state.module)
    hooks.install(state, inner, routed_blocks(model, inner, config.layers))
    base_saves.install(model)
    private.answer_trainer(model, MODULE_NAME, functools.partial(is_trained, model))
    private.forget_compiled_code()
    return state


def mlp_parameters(model: Any, state: ExpertsState) -> tuple[list[dict[str, Tensor]], int]:
    """Return the parameters of each routed block's MLP, by path, and D of its tokens."""
    blocks = routed_blocks(model, state.family.inner(model), state.config.layers)
    return [base_parameters(mlp) for _, mlp in blocks], token_width(blocks[0][1])
