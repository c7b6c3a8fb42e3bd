"""patch_model and unpatch_model."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from . import (
    attachment,
    base_saves,
    named,
    precision,
    private,
    pushing,
    sharding,
    starting,
    training,
    tuners,
    wrappers,
)
from .alignment import EmmaAlignment
from .config import EmmaConfig
from .errors import PatchError
from .families import find_family, require_model
from .fitting import make_pipeline, make_reader, resolve_encoder, resolve_sizes
from .guards import MethodGuard, guard_features, guard_generate, guard_replication
from .handle import EmmaAdapter
from .hooks import install_call_hooks, remove_hooks
from .state import DEFAULT, STATE_ATTRIBUTE, AdapterState, state_of
from .surroundings import undisturbed
from .unified.detaching import is_unified, take_off
from .wrappers import base_of


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
        config: what adapter; every size left None is read off the model. Default: ``EmmaConfig()``.
        processor: the model's processor or tokenizer. Without it the instruction is the whole prompt, answers
            and special tokens excluded; with it, the user's turns, or with a warning the whole prompt, if its chat
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
    attachment.check_unshared(inner, family.projector(inner), *family.deepstack_projectors(inner))
    config = EmmaConfig() if config is None else config
    # The encoder last: it may be large, and what is wrong with the sizes shows without it.
    config = resolve_sizes(config, family, inner)
    config, encoder = resolve_encoder(config, instruction_encoder, inner)
    pipeline = make_pipeline(config, make_reader(model, config, processor), encoder)
    state = AdapterState(family, config, pipeline, model)
    alignments = named.make_alignments(family, config, inner)

    install(model, state, alignments, around)
    return EmmaAdapter(model)


def install(
    model: nn.Module, state: AdapterState, alignments: Mapping[str, EmmaAlignment], around: Sequence[nn.Module] = ()
) -> None:
    """Put an adapter on a model, and what guards it on the wrappers around the model."""
    family = state.family
    inner = family.inner(model)
    for module in (model, inner):
        setattr(module, STATE_ATTRIBUTE, state)
    named.attach(model, DEFAULT, alignments)
    install_call_hooks(model, inner)
    MethodGuard.install(model, "generate", guard_generate)
    MethodGuard.install(model, "save_pretrained", base_saves.guard_save_pretrained)
    # Of a part, which the model holds: build().train() would be left with nothing but its guard.
    MethodGuard.install(family.projector(inner) if inner is model else inner, "train", starting.guard_train)
    base_saves.expect_checkpoints(model)
    starting.expect_trainer(model)
    precision.remember_weights(model)
    for module in dict.fromkeys((model, inner)):
        MethodGuard.install(module, private.REPLICATE, guard_replication)
    for modality in family.modalities:
        method = family.feature_methods.get(modality)
        if method is not None and hasattr(inner, method):
            MethodGuard.install(inner, method, functools.partial(guard_features, modality))
    pushing.install(model)
    tuners.guard_wrappers(around)
    private.forget_compiled_code()


@undisturbed()
def unpatch_model(model: nn.Module) -> None:
    """Take off again what ``patch_model`` and ``unify_model`` put on; what is left is the original model, bit for bit.

    Raises:
        PatchError: if the model is not patched, or was sharded since.
    """
    around, model = wrappers.around(model), base_of(model)
    unified = is_unified(model)
    if hasattr(model, STATE_ATTRIBUTE) or not unified:
        take_off_adapters(model, around)
    if unified:
        take_off(model)


def take_off_adapters(model: nn.Module, around: Sequence[nn.Module] = ()) -> None:
    """Take off what ``patch_model`` put on a model, and on the wrappers around it, and nothing else."""
    state = state_of(model)
    if sharding.is_fully_sharded(model):
        raise PatchError(
            "FSDP has sharded the model with the adapter in it, which can't be taken out any more; "
            "with adapter.disabled(): … is the original model"
        )
    training.undo_train_only(model)
    private.expect_whole_saves(model)
    private.stop_answering_trainer(model)
    # Every module, not just the patched ones: other tools copy projectors, hooks and all.
    modules = set(model.modules())
    with contextlib.suppress(PatchError):
        # A shallow copy (copy.copy) shares all that the model which it was made of has, but not its attributes.
        modules.add(state.model)
    for module in [module for module in modules if module.__dict__.get(STATE_ATTRIBUTE) is state]:
        for guard in [value for value in module.__dict__.values() if isinstance(value, MethodGuard)]:
            if guard.switch == STATE_ATTRIBUTE:
                guard.remove(module)
        remove_hooks(module)
        attachment.detach(module)
    tuners.release_wrappers(around)
    private.forget_compiled_code()
