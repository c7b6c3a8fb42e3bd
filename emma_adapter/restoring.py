"""From a checked adapter folder to an adapter of a patched model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from . import attachment, base_saves, checkpoint, named, training
from .config import EmmaConfig
from .errors import CheckpointError, PatchError
from .families import find_family
from .fitting import embedding_dim, make_pipeline, make_reader, resolve_encoder
from .fusion.dispatch import Kernel
from .instructions.tokens import LLM
from .state import STATE_ATTRIBUTE, state_of


def restore(
    model: nn.Module,
    saved: checkpoint.SavedAdapter,
    *,
    name: str | None = None,
    processor: Any = None,
    instruction_encoder: str | nn.Module | None = None,
    kernel: Kernel | None = None,
) -> None:
    """Load into the adapter of that name (default: the active one), which is added if there is none.

    Raises:
        PatchError: if it is an adapter of another kind than the saved one.
    """
    state = state_of(model)
    active = state.active
    name = active if name is None else name
    if name not in state.adapters:
        config = saved.config if kernel is None else saved.config.replace(kernel=kernel)
        check_encoder_fit(model, saved)
        named.add(model, name, config, processor, instruction_encoder)
    else:
        here = state.adapters[name].config
        if not _same_build(here, saved.config, ignore_encoder=instruction_encoder is not None):
            raise PatchError(
                "the model is patched with another kind of adapter than the saved one; unpatch_model(model) first, and "
                "load_adapter will patch it, or load_adapter(model, …, name=…) under another name. "
                f"Here: {here}; saved: {saved.config}"
            )
        _refit(model, name, processor, instruction_encoder, kernel)
    named.activate(model, name)
    assign(model, saved)
    named.activate(model, active)


def assign(model: nn.Module, saved: checkpoint.SavedAdapter) -> None:
    """Give the active adapter, and the projector, the saved values."""
    if saved.projector:
        training.keep_original_projectors(model)
    else:
        training.reset_projectors(model)
    training.assign(model, saved.alignment, saved.projector)
    if state_of(model).adapter_only:
        base_saves.expect_adapter_only(model)


def check_fit(model: nn.Module, saved: checkpoint.SavedAdapter) -> None:
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


def check_not_offloaded(model: nn.Module, saved: checkpoint.SavedAdapter, name: str | None) -> None:
    """That everything which will be given new values is there to take them.

    Raises:
        PatchError: if it isn't.
    """
    family = find_family(model)
    taking: list[Tensor] = []
    state = getattr(model, STATE_ATTRIBUTE, None)
    if state is not None and (name or state.active) in state.adapters:
        taking += attachment.state_dict(model, name, keep_vars=True).values()
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


def check_encoder_fit(model: nn.Module, saved: checkpoint.SavedAdapter) -> None:
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
    model: nn.Module, name: str, processor: Any, instruction_encoder: str | nn.Module | None, kernel: Kernel | None
) -> None:
    """Give an adapter another processor, encoder or kernel, where one is given."""
    state = state_of(model)
    adapter = state.adapters[name]
    if kernel is not None:
        adapter.config = adapter.config.replace(kernel=kernel)
        for alignment in attachment.alignments(model, name).values():
            alignment.use_kernel(kernel)
    reader, encoder = adapter.pipeline.reader, adapter.pipeline.encoder
    if processor is not None:
        reader = make_reader(model, adapter.config, processor)
    if instruction_encoder is not None:
        adapter.config, encoder = resolve_encoder(adapter.config, instruction_encoder, state.family.inner(model))
    adapter.pipeline = make_pipeline(adapter.config, reader, encoder)
