"""Branches that draw: making one, and several named branches on one model, of which one is active."""

from __future__ import annotations

from os import PathLike
from typing import Any

from torch import Tensor, nn

from ..errors import ConfigError, PatchError, UnsupportedModelError
from ..models.families import ModelFamily
from ..models.projected_tokens import require_alignable_output
from ..modules import private, sharding
from .autoencoder import LatentCoder
from .config import UnifiedConfig
from .layers import text_model_of
from .module import UnifiedModule
from .state import MODULE_NAME, Branch, unified_state


def make_branch(
    model: Any,
    family: ModelFamily,
    config: UnifiedConfig,
    autoencoder: LatentCoder | str | PathLike[str] | nn.Module,
) -> Branch:
    """Return a new branch for a model, without putting it on the model.

    Raises:
        UnsupportedModelError: if the model has no cache of keys and values to draw against, or is quantized and the
            config asks for full copies.
        PatchError: if the model is sharded, or on several devices.
        ConfigError: if a size in ``config`` contradicts the model or the autoencoder.
        AutoencoderError: if the autoencoder can't be loaded or doesn't follow the protocol.
    """
    inner = family.inner(model)
    require_alignable_output(family, inner)
    if family.cannot_draw:
        raise UnsupportedModelError(
            f"{type(model).__name__} can't be made to draw: {family.cannot_draw}; use a model of a family in "
            "docs/unified.md"
        )
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
    coder = autoencoder if isinstance(autoencoder, LatentCoder) else LatentCoder(autoencoder)
    config = coder.completed(config)
    return Branch(config, UnifiedModule(config, inner).train(model.training), coder)


def add(
    model: nn.Module, name: str, config: UnifiedConfig, autoencoder: str | PathLike[str] | nn.Module | None
) -> None:
    """Add a frozen branch, without making it active. Default autoencoder: that of the active branch.

    Raises:
        PatchError: if the name is taken, or can't be a submodule's; and as :func:`make_branch`.
    """
    state = unified_state(model)
    if not isinstance(name, str) or not name.isidentifier() or hasattr(nn.ModuleDict, name):
        raise PatchError(
            "the name of a branch must be letters, digits and underscores, and not one that nn.ModuleDict uses itself; "
            f"got {name!r}"
        )
    if name in state.branches:
        raise PatchError(f"the model has a branch {name!r} already: {sorted(state.branches)}; choose another name")
    branch = make_branch(model, state.family, config, state.coder if autoencoder is None else autoencoder)
    branch.module.requires_grad_(False)
    state.branches[name] = branch
    model.get_submodule(MODULE_NAME).add_module(name, branch.module)


def activate(model: nn.Module, name: str) -> None:
    """Make another branch the active one: trainable if the previous one was, which is frozen.

    Raises:
        PatchError: if there is no branch of that name.
    """
    state = unified_state(model)
    _require(model, name)
    if name == state.active:
        return
    trainable = any(parameter.requires_grad for parameter in state.module.parameters())
    state.module.requires_grad_(False)
    state.active = name
    state.module.requires_grad_(trainable)
    private.forget_compiled_code()


def remove(model: nn.Module, name: str) -> None:
    """Take off a branch that is not active.

    Raises:
        PatchError: if there is no branch of that name, or it is the active one.
    """
    state = unified_state(model)
    _require(model, name)
    if name == state.active:
        raise PatchError(
            f"{name!r} is the active branch: set_adapter() another one first, or remove() all, without a name"
        )
    del state.branches[name]
    delattr(model.get_submodule(MODULE_NAME), name)


def _require(model: nn.Module, name: str) -> None:
    branches = unified_state(model).branches
    if not isinstance(name, str) or name not in branches:
        raise PatchError(
            f"the model has no branch {name!r}; it has {sorted(branches)}: name one of these, or add_adapter() it"
        )


def _check_whole(text: nn.Module) -> None:
    """Check that all of a decoder's weights are in this process, or offloaded from it, and compute on one device.

    Raises:
        PatchError: if they aren't.
    """
    devices = set()
    for module in text.modules():
        offloaded_values = private.offloaded_values(module)
        for name, parameter in module.named_parameters(recurse=False):
            value = offloaded_values.get(name, parameter)
            if sharding.is_elsewhere(value):
                raise PatchError(
                    "weights of the language model are sharded (tensor parallel, FSDP, ZeRO-3), or offloaded by other "
                    "hooks than those that accelerate puts on each layer's own modules, and what draws uses them "
                    "outside of the calls that gather them: load the model whole on one device, or offloaded by "
                    "device_map, cpu_offload or disk_offload without preload_module_classes"
                )
            devices.add(_device_of(value))
    if len(devices) > 1:
        raise PatchError(
            f"the language model is spread over {sorted(devices)}, and what draws needs it on one device: load "
            "it without device_map, or with all of the language model on one"
        )


def _device_of(value: Tensor) -> str:
    return str(value.device)
