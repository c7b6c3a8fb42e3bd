"""load_adapter: from an adapter folder to a patched model."""

from __future__ import annotations

import warnings
from os import PathLike
from typing import Any

from torch import Tensor, nn

from . import attachment, base_saves, checkpoint, hub, sharding, training
from .config import EmmaConfig
from .errors import CheckpointError, PatchError
from .families import find_family
from .fitting import embedding_dim, make_pipeline, make_reader, resolve_encoder
from .fusion.dispatch import Kernel
from .instructions.tokens import LLM
from .patching import EmmaAdapter, base_of, patch_model
from .state import STATE_ATTRIBUTE, state_of


def load_adapter(
    model: nn.Module,
    source: str | PathLike[str],
    *,
    processor: Any = None,
    instruction_encoder: str | nn.Module | None = None,
    kernel: Kernel | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
) -> EmmaAdapter:
    """Load a saved adapter into a model, which is patched if it isn't yet.

    Args:
        model: as for :func:`patch_model`.
        source: a folder that ``save_pretrained`` wrote, or a hub id.
        processor: as for :func:`patch_model`; an already patched model keeps the one it has, if none is given.
        instruction_encoder: where the adapter's instruction encoder is found now, if elsewhere than when it was
            saved; needed for an encoder module of your own.
        kernel: what computes the adapter, as in :class:`EmmaConfig`; default: ``"auto"``, or what an already patched
            model was told.
        revision: branch, tag or commit on the hub.
        local_files_only: don't ask the hub; use what was downloaded before.

    Raises:
        CheckpointError: if the files are incomplete, damaged, of a newer format, or made for another model. The
            model is then as it was.
        EncoderError: if the instruction encoder can't be loaded.
        PatchError: if the model is patched with another kind of adapter, or sharded by FSDP.
    """
    if sharding.is_fully_sharded(model):
        raise PatchError("the model is sharded by FSDP: load_adapter first, then shard")
    model = base_of(model)
    saved = checkpoint.read(hub.local_folder(source, revision=revision, local_files_only=local_files_only))
    _check_fit(model, saved)
    _check_not_offloaded(model, saved)
    if not hasattr(model, STATE_ATTRIBUTE):
        _check_encoder_fit(model, saved)
        if saved.reads_turns and processor is None:
            warnings.warn(
                f"{saved.source} was used with a processor, which tells the user's turns from the rest of the prompt; "
                "without one, the whole prompt is the instruction: load_adapter(model, …, processor=processor)",
                stacklevel=2,
            )
        config = saved.config if kernel is None else saved.config.replace(kernel=kernel)
        patch_model(model, config, processor=processor, instruction_encoder=instruction_encoder)
    elif not _same_build(state_of(model).config, saved.config, ignore_encoder=instruction_encoder is not None):
        raise PatchError(
            "the model is patched with another kind of adapter than the saved one; unpatch_model(model) first, and "
            f"load_adapter will patch it. Here: {state_of(model).config}; saved: {saved.config}"
        )
    else:
        _refit(model, processor, instruction_encoder, kernel)
    if saved.projector:
        training.keep_original_projectors(model)
    else:
        training.reset_projectors(model)
    training.assign(model, saved.alignment, saved.projector)
    if state_of(model).adapter_only:
        base_saves.expect_adapter_only(model)
    return EmmaAdapter(model)


def _check_fit(model: nn.Module, saved: checkpoint.SavedAdapter) -> None:
    """That the saved adapter was made for a model like this one, before anything is changed."""
    family = find_family(model)
    inner = family.inner(model)
    config: Any = model.config
    if saved.model_type != config.model_type:
        raise CheckpointError(
            f"{saved.source} was made for model_type {saved.model_type!r}; this model is {config.model_type!r}"
        )
    if saved.config.visual_dim != family.visual_dim(inner):
        raise CheckpointError(
            f"{saved.source} was made for visual tokens of {saved.config.visual_dim} channels; this model's have "
            f"{family.visual_dim(inner)}: it was trained on another vision tower"
        )
    number, _ = family.visual_size(inner)
    if family.has_fixed_size(inner) and saved.config.num_visual_tokens not in (None, number):
        raise CheckpointError(
            f"{saved.source} was made for {saved.config.num_visual_tokens} visual tokens an image; "
            f"this model has {number}"
        )
    places = attachment.places(family, saved.config, inner)
    if set(places) != {_place_of(name) for name in saved.alignment}:
        raise CheckpointError(
            f"{saved.source} was made for a model with {len({_place_of(name) for name in saved.alignment}) - 1} "
            f"deepstack projectors; this model has {len(places) - 1}"
        )
    if saved.projector:
        own = {
            place + name: parameter
            for place, projector in places.items()
            for name, parameter in attachment.projector_parameters(projector).items()
        }
        checkpoint.check_tensors(saved.projector, own, saved.source)
    if not saved.intact:
        raise CheckpointError(
            f"{saved.source / checkpoint.WEIGHTS_NAME} is damaged: its tensors don't match the checksum they were "
            "saved with; take another copy"
        )


def _check_not_offloaded(model: nn.Module, saved: checkpoint.SavedAdapter) -> None:
    """That everything which will be given new values is there to take them."""
    family = find_family(model)
    taking: list[Tensor] = []
    if hasattr(model, STATE_ATTRIBUTE):
        taking += attachment.state_dict(model, keep_vars=True).values()
    if saved.projector:
        places = attachment.places(family, saved.config, family.inner(model)).values()
        taking += [value for projector in places for value in attachment.projector_parameters(projector).values()]
    if any(value.is_meta for value in taking):
        raise PatchError(
            f"{saved.source} holds weights of parts that are offloaded: load_adapter first, then dispatch the model"
        )


def _place_of(name: str) -> str:
    match = attachment.DEEPSTACK_PLACE.match(name)
    return match[0] if match else attachment.MAIN_PLACE


def _check_encoder_fit(model: nn.Module, saved: checkpoint.SavedAdapter) -> None:
    if saved.config.instruction_encoder == LLM:
        width = embedding_dim(find_family(model).inner(model))
        if saved.config.instruction_dim != width:
            raise CheckpointError(
                f"{saved.source} was made for a language model with embeddings of {saved.config.instruction_dim} "
                f"channels; this model's have {width}"
            )


def _same_build(one: EmmaConfig, other: EmmaConfig, *, ignore_encoder: bool) -> bool:
    """True if both have the same weights and read the same instruction, wherever the encoder is found."""
    ignored: dict[str, Any] = {"cache_size": 0, "kernel": "auto"}
    if ignore_encoder:
        ignored["instruction_encoder"] = "given"
    return one.replace(**ignored) == other.replace(**ignored)


def _refit(
    model: nn.Module, processor: Any, instruction_encoder: str | nn.Module | None, kernel: Kernel | None
) -> None:
    """Give a patched model another processor, encoder or kernel, where one is given."""
    state = state_of(model)
    if kernel is not None:
        state.config = state.config.replace(kernel=kernel)
        for alignment in attachment.alignments(model).values():
            alignment.use_kernel(kernel)
    reader, encoder = state.pipeline.reader, state.pipeline.encoder
    if processor is not None:
        reader = make_reader(model, state.config, processor)
    if instruction_encoder is not None:
        state.config, encoder = resolve_encoder(state.config, instruction_encoder, state.family.inner(model))
    state.pipeline = make_pipeline(state.config, reader, encoder)
