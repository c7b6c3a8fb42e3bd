"""``patch_model`` and ``unpatch_model``."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import nn

from ..alignment.config import EmmaConfig
from ..alignment.module import EmmaAlignment
from ..checkpoints import base_model, pushing
from ..errors import PatchError
from ..experts import detaching as experts
from ..models.registry import find_family, require_model
from ..modules import omni, private, sharding, wrappers
from ..modules.method_guard import STATE_ATTRIBUTE, MethodGuard
from ..modules.torch_modes import undisturbed
from ..modules.wrappers import base_of
from ..patching import precision, sites, trainable_parameters
from ..patching.guards import guard_features, guard_generate, guard_replication
from ..patching.hooks import install_call_hooks, remove_hooks
from ..patching.own_projector import OwnProjector
from ..patching.sites import DEFAULT
from ..patching.state import AdapterState, state_of
from ..unified import detaching as unified
from . import named_adapters, peft, training_start
from .config_from_model import make_pipeline, make_reader, resolve_encoder, resolve_sizes
from .handle import EmmaAdapter


@undisturbed()
def patch_model(
    model: nn.Module,
    config: EmmaConfig | None = None,
    *,
    processor: Any = None,
    instruction_encoder: str | nn.Module | None = None,
) -> EmmaAdapter:
    """Make a vision-language model instruction-aware, in place.

    The model answers bit for bit as before until the adapter is trained, and again after ``unpatch_model``.

    Args:
        model: a transformers model of a supported family (a ``PeftModel``, or what ``torch.compile`` returned, is
            patched at the model inside).
        config: kind of the adapter; every size left None is read off the model. Default: ``EmmaConfig()``.
        processor: the model's processor or tokenizer. Without it the instruction is the whole prompt, answers
            and special tokens excluded; with it, the user's turns, or the whole prompt, with a warning, if its chat
            template doesn't show them. Text towers need it to read prompts.
        instruction_encoder: overrides ``config.instruction_encoder``; also a module of your own that follows
            :class:`~emma_adapter.InstructionEncoder`.

    Raises:
        UnsupportedModelError: for an unknown family, or a fusion that can't work on this vision tower.
        PatchError: if the model is patched already, wrapped for several processes, or shares its projector with
            another patched model.
        ConfigError: if a size in ``config`` contradicts the model or the encoder.
        EncoderError: if the instruction encoder can't be loaded.
    """
    require_model(model)
    around = wrappers.around(model)
    if any(map(wrappers.knows_its_parameters, around)) or sharding.is_fully_sharded(model):
        raise PatchError(
            "the model is wrapped in DistributedDataParallel, DeepSpeed's engine or AveragedModel, or sharded by FSDP, "
            "which would never learn of the adapter's parameters: patch_model or load_adapter first, then wrap"
        )
    model = base_of(model)
    family = find_family(model)
    if hasattr(model, STATE_ATTRIBUTE):
        raise PatchError(
            "this model is already patched; use get_adapter(model) for its adapter, or unpatch_model(model) first"
        )
    inner = family.inner(model)
    sites.check_unshared(inner, family.projector(inner), *family.deepstack_projectors(inner))
    config = EmmaConfig() if config is None else config
    # The encoder comes last: it may be large, and wrong sizes are found without it.
    config = resolve_sizes(config, family, inner)
    config, encoder = resolve_encoder(config, instruction_encoder, inner)
    pipeline = make_pipeline(config, make_reader(model, config, processor), encoder)
    state = AdapterState(family, config, pipeline, model)
    alignments = named_adapters.make_alignments(family, config, inner)

    install(model, state, alignments, around=around)
    return EmmaAdapter(model)


def install(
    model: nn.Module,
    state: AdapterState,
    alignments: Mapping[str, EmmaAlignment],
    projectors: Mapping[str, OwnProjector] = MappingProxyType({}),
    around: Sequence[nn.Module] = (),
) -> None:
    """Put an adapter on a model, and its guards on the wrappers around the model."""
    family = state.family
    inner = family.inner(model)
    for module in (model, inner):
        setattr(module, STATE_ATTRIBUTE, state)
    named_adapters.attach(model, state.adapters[DEFAULT], alignments, projectors)
    install_call_hooks(model, inner)
    MethodGuard.install(model, "generate", guard_generate)
    MethodGuard.install(model, "save_pretrained", base_model.guard_save_pretrained)
    # On a part of the model: were the model itself guarded, build().train() would drop it before the call.
    MethodGuard.install(family.projector(inner) if inner is model else inner, "train", training_start.guard_train)
    base_model.expect_checkpoints(model)
    training_start.expect_trainer(model)
    precision.remember_weights(model)
    for module in dict.fromkeys((model, inner)):
        MethodGuard.install(module, private.REPLICATE, guard_replication)
    for modality in family.modalities:
        method = family.feature_methods.get(modality)
        if method is not None and hasattr(inner, method):
            MethodGuard.install(inner, method, functools.partial(guard_features, modality))
    pushing.install(model)
    peft.guard_wrappers(around)
    omni.guard_wrappers(around)
    private.forget_compiled_code()


@undisturbed()
def unpatch_model(model: nn.Module) -> None:
    """Take off what ``patch_model``, ``unify_model`` and ``add_vision_expert`` put on a model.

    What is left is the original model, bit for bit.

    Raises:
        PatchError: if the model is not patched, or was sharded since.
    """
    around, model = wrappers.around(model), base_of(model)
    others = [part for part in (unified, experts) if part.is_on(model)]
    if hasattr(model, STATE_ATTRIBUTE) or not others:
        take_off_adapters(model, around)
    for part in others:
        part.take_off(model)
    omni.release_wrappers(around)


def take_off_adapters(model: nn.Module, around: Sequence[nn.Module] = ()) -> None:
    """Take off what ``patch_model`` put on a model, and on the wrappers around it, and nothing else."""
    state = state_of(model)
    if sharding.is_fully_sharded(model):
        raise PatchError(
            "FSDP has sharded the model with the adapter in it, which can't be taken out any more; "
            "with adapter.disable_adapter(): … is the original model"
        )
    trainable_parameters.undo_train_only(model)
    private.expect_whole_saves(model)
    private.stop_answering_trainer(model, STATE_ATTRIBUTE)
    # All modules, not just those that were patched: other tools copy projectors, hooks included.
    modules = set(model.modules())
    with contextlib.suppress(PatchError):
        # A shallow copy (copy.copy) shares the modules of the model it was made of, but that model is none of them.
        modules.add(state.model)
    for module in [module for module in modules if module.__dict__.get(STATE_ATTRIBUTE) is state]:
        MethodGuard.remove_all(module, STATE_ATTRIBUTE)
        remove_hooks(module)
        sites.detach(module)
    peft.release_wrappers(around)
    omni.release_wrappers(around)
    private.forget_compiled_code()
