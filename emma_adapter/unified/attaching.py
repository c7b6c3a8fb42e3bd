"""unify_model, and putting a generation branch on a model."""

from __future__ import annotations

import functools
from os import PathLike
from typing import Any

from torch import nn

from ..errors import PatchError
from ..models.registry import find_family, require_model
from ..modules import omni, private, sharding, wrappers
from ..modules.torch_modes import undisturbed
from ..modules.trainability import is_trained
from ..modules.wrappers import base_of
from . import base_saves, calls, fusion, generation_mode
from .branches import make_branch
from .config import UnifiedConfig
from .handle import EmmaUnified
from .prompts import check_processor
from .state import MODULE_NAME, STATE_ATTRIBUTE, UnifiedState


@undisturbed()
def unify_model(
    model: nn.Module,
    config: UnifiedConfig | None = None,
    *,
    processor: Any = None,
    autoencoder: str | PathLike[str] | nn.Module,
) -> EmmaUnified:
    """Let a vision-language model also draw and edit pictures, in place.

    The model's answers stay the same, bit for bit: the branch that draws shares the base's weights where it has none of
    its own, and never changes them. (With ``fuse_understanding``, answers change once the branch is trained.)

    Args:
        model: a transformers model of a supported family, or a ``PeftModel`` around one.
        config: default: ``UnifiedConfig()``, low-rank copies for one GPU.
        processor: the model's processor, with a chat template; it formats the prompts.
        autoencoder: hub id or folder of an ``AutoencoderDC`` of diffusers, or a module that follows the same protocol
            (``docs/unified.md``). It is frozen, and kept out of the model's ``state_dict``.

    Raises:
        UnsupportedModelError: if the family is unknown, or the model has no cache of keys and values to draw against.
        PatchError: if the model draws already, is wrapped for several processes, sharded, or on several devices.
        ConfigError: if a size in ``config`` contradicts the model or the autoencoder, or there is no processor.
        AutoencoderError: if the autoencoder can't be loaded or doesn't follow the protocol.
    """
    require_model(model)
    around = wrappers.around(model)
    if any(map(wrappers.knows_its_parameters, around)) or sharding.is_fully_sharded(model):
        raise PatchError(
            "the model is wrapped in DistributedDataParallel, DeepSpeed's engine or AveragedModel, or sharded by FSDP, "
            "which would never learn of the new parameters: unify_model or load_unified first, then wrap "
            "(DistributedDataParallel; sharded models can't draw)"
        )
    model = base_of(model)
    if STATE_ATTRIBUTE in model.__dict__:
        raise PatchError(
            "this model was made to draw already: add_adapter(name) puts another branch beside the first, and "
            "unpatch_model(model) takes all off"
        )
    family = find_family(model)
    check_processor(processor)
    branch = make_branch(model, family, UnifiedConfig() if config is None else config, autoencoder)
    install(model, UnifiedState(family, branch, processor))
    omni.guard_wrappers(around)
    return EmmaUnified(model)


def install(model: nn.Module, state: UnifiedState) -> None:
    """Put a generation branch on a model: its state, parameters, hooks and guards."""
    inner = state.family.inner(model)
    projector = state.family.projector(inner)
    for module in dict.fromkeys((model, inner, projector)):
        module.__dict__[STATE_ATTRIBUTE] = state
    model.add_module(MODULE_NAME, nn.ModuleDict({state.active: state.module}))
    fusion.install(inner, projector)
    calls.install(model, inner)
    base_saves.install(model)
    generation_mode.install(model, EmmaUnified)
    private.answer_trainer(model, MODULE_NAME, functools.partial(is_trained, model))
    private.forget_compiled_code()
