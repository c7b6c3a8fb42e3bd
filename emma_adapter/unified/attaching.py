"""unify_model, and taking off again what it put on a model."""

from __future__ import annotations

import functools
from os import PathLike
from typing import Any

from torch import Tensor, nn

from ..errors import ConfigError, PatchError, UnsupportedModelError
from ..models.families import find_family, require_model
from ..modules import private, sharding, wrappers
from ..modules.torch_modes import undisturbed
from ..modules.wrappers import base_of
from . import base_saves, calls, fusion, generation_mode
from .autoencoder import LatentCoder
from .config import UnifiedConfig
from .handle import EmmaUnified
from .layers import text_model_of
from .module import UnifiedModule
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

    The model's answers stay the same, bit for bit: the base's weights are shared where the branch that draws doesn't
    have its own, and never changed by it. (With ``fuse_understanding`` they stay so until that is trained.)

    Args:
        model: a transformers model of a supported family (a ``PeftModel`` is taken at the model inside).
        config: default: ``UnifiedConfig()``, low-rank copies for one GPU.
        processor: the model's processor, with a chat template; it makes the prompts.
        autoencoder: hub id or folder of an ``AutoencoderDC`` of diffusers, or a module of the same protocol
            (``docs/unified.md``). It is frozen, and kept out of the model's ``state_dict``.

    Raises:
        UnsupportedModelError: for an unknown family, or a model that has no cache of keys and values to draw against.
        PatchError: if the model was made to draw already, is wrapped for several processes, sharded, or on several
            devices.
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
        raise PatchError("this model was made to draw already: unpatch_model(model) first, to do it anew")
    family = find_family(model)
    check_processor(processor)
    config = UnifiedConfig() if config is None else config
    inner = family.inner(model)
    text = text_model_of(inner)
    _check_whole(text)
    layers = len(text.layers)
    if config.shared_layers is not None and config.shared_layers > layers:
        raise ConfigError(
            f"UnifiedConfig.shared_layers={config.shared_layers} is more than the model's {layers} layers"
        )
    if config.decoupling == "full" and getattr(model, "is_quantized", False):
        raise UnsupportedModelError(
            "the model is quantized, and full copies of its layers need weights that are not: use low-rank copies, "
            "UnifiedConfig(decoupling=64), or load the model in bfloat16"
        )
    coder = LatentCoder(autoencoder)
    config = coder.completed(config)
    module = UnifiedModule(config, inner).train(model.training)
    install(model, UnifiedState(family, config, module, processor, coder))
    return EmmaUnified(model)


def _check_whole(text: nn.Module) -> None:
    """That every weight of the decoder is in this process or offloaded from it, and computes on one device."""
    devices = set()
    for module in text.modules():
        offloaded = private.offloaded_values(module)
        for name, own in module.named_parameters(recurse=False):
            parameter = offloaded.get(name, own)
            if sharding.is_elsewhere(parameter):
                raise PatchError(
                    "weights of the language model are sharded (tensor parallel, FSDP, ZeRO-3), or offloaded by other "
                    "hooks than those that accelerate puts on each layer's own modules, and what draws uses them "
                    "outside of the calls that gather them: load the model whole on one device, or offloaded by "
                    "device_map, cpu_offload or disk_offload without preload_module_classes"
                )
            devices.add(_device_of(parameter))
    if len(devices) > 1:
        raise PatchError(
            f"the language model is spread over {sorted(devices)}, and what draws needs it on one device: load "
            "it without device_map, or with all of the language model on one"
        )


def _is_trained(model: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in model.parameters())


def _device_of(parameter: Tensor) -> str:
    return str(parameter.device)


def install(model: nn.Module, state: UnifiedState) -> None:
    """Put a generation branch on a model."""
    inner = state.family.inner(model)
    projector = state.family.projector(inner)
    for module in dict.fromkeys((model, inner, projector)):
        module.__dict__[STATE_ATTRIBUTE] = state
    model.add_module(MODULE_NAME, state.module)
    fusion.install(inner, projector)
    calls.install(model, inner)
    base_saves.install(model)
    generation_mode.install(model, EmmaUnified)
    private.answer_trainer(model, MODULE_NAME, functools.partial(_is_trained, model))
    private.forget_compiled_code()
