"""From a checked adapter folder to an adapter of a patched model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..alignment.config import EmmaConfig
from ..alignment.fusion.dispatch import Kernel
from ..checkpoints import reading
from ..errors import CheckpointError, EncoderError, PatchError
from ..files.untrusted import listed, shown
from ..instructions.encoders import names_a_path
from ..instructions.pipeline import LLM
from ..models.families import find_family
from ..patching import precision, sites, trainable_parameters
from ..patching.state import STATE_ATTRIBUTE, state_of
from . import named
from .config_from_model import embedding_dim, make_pipeline, make_reader, resolve_encoder

_REMEDY = "load it into the model it was made for"


def read_for(model: nn.Module, directory: Path, name: str | None = None) -> reading.SavedAdapter:
    """A saved adapter that can be loaded into this model, of which nothing is changed yet.

    Raises:
        CheckpointError: if the files are damaged, or made for another model. That shows before the values are read.
        PatchError: if parts that would take the values are offloaded.
    """
    saved = reading.read(directory, check=lambda described: check_fit(model, described))
    check_fit(model, saved)
    if not saved.intact:
        raise CheckpointError(
            f"{saved.source / checkpoint.WEIGHTS_NAME} is damaged: its tensors don't match the checksum they were "
            "saved with; take another copy"
        )
    check_not_offloaded(model, saved, name)
    return saved


def restore(
    model: nn.Module,
    saved: reading.SavedAdapter,
    *,
    name: str | None = None,
    processor: Any = None,
    instruction_encoder: str | nn.Module | None = None,
    kernel: Kernel | None = None,
    downloaded: bool = False,
) -> None:
    """Load into the adapter of that name (default: the active one), which is added if there is none. Which one is
    active stays as it is, also meanwhile. If it fails, nothing has changed.

    Raises:
        PatchError: if it is an adapter of another kind than the saved one.
    """
    state = state_of(model)
    name = state.active if name is None else name
    if name not in state.adapters:
        config = saved.config if kernel is None else saved.config.replace(kernel=kernel)
        check_encoder(model, saved, instruction_encoder, downloaded=downloaded)
        try:
            named.add(model, name, config, processor, instruction_encoder)
            assign(model, name, saved)
        except BaseException:
            if name in state.adapters:
                named.remove(model, name)
            raise
        return
    here = state.adapters[name].config
    if not _same_build(here, saved.config, ignore_encoder=instruction_encoder is not None):
        raise PatchError(
            "the model is patched with another kind of adapter than the saved one; unpatch_model(model) first, and "
            "load_adapter will patch it, or load_adapter(model, …, name=…) under another name. "
            f"Here and in {saved.source} differ: {listed(_differences(here, saved.config))}"
        )
    with _undone_on_failure(model, name, projector=bool(saved.projector or state.adapters[name].original_projectors)):
        _refit(model, name, processor, instruction_encoder, kernel)
        assign(model, name, saved)


def assign(model: nn.Module, name: str, saved: reading.SavedAdapter) -> None:
    """Give an adapter, and the projector trained with it, the saved values."""
    trainable_parameters.assign(model, name, saved.alignment, saved.projector)
    precision.remember_weights(model)


@contextmanager
def _undone_on_failure(model: nn.Module, name: str, *, projector: bool) -> Iterator[None]:
    """Take back what loading has changed of an adapter, and with ``projector=True`` of the projector, if the block
    raises."""
    state = state_of(model)
    adapter = state.adapters[name]
    fields = dict(vars(adapter))
    # An adapter's values are replaced, a projector's written over.
    values = {tensor: tensor.data for tensor in sites.state_dict(model, name, keep_vars=True).values()}
    own = trainable_parameters.projector_parameters(model, name).values() if projector else ()
    written_over = {parameter: parameter.detach().clone() for parameter in own}
    kernels = {alignment: alignment.config.kernel for alignment in sites.alignments(model, name).values()}
    try:
        yield
    except BaseException:
        vars(adapter).update(fields)
        if not adapter.original_projectors:
            for place in sites.projectors(model, name).values():
                sites.remove_original(place, name)
        for tensor, data in values.items():
            tensor.data = data
        for parameter, value in written_over.items():
            parameter.data.copy_(value)
        for alignment, kernel in kernels.items():
            if alignment.config.kernel != kernel:
                alignment.use_kernel(kernel)
        raise


def check_fit(model: nn.Module, saved: reading.SavedAdapter) -> None:
    """That the saved adapter was made for a model like this one, before anything is changed."""
    family = find_family(model)
    inner = family.inner(model)
    config: Any = model.config
    if saved.model_type != config.model_type:
        raise CheckpointError(
            f"{saved.source} was made for model_type {shown(saved.model_type)}; this model is {config.model_type!r}: "
            f"{_REMEDY}"
        )
    if saved.config.visual_dim != family.visual_dim(inner):
        raise CheckpointError(
            f"{saved.source} was made for visual tokens of {saved.config.visual_dim} channels; this model's have "
            f"{family.visual_dim(inner)}: it was trained on another vision tower; {_REMEDY}"
        )
    number, _ = family.visual_size(inner)
    if family.has_fixed_size(inner) and saved.config.num_visual_tokens not in (None, number):
        raise CheckpointError(
            f"{saved.source} was made for {saved.config.num_visual_tokens} visual tokens an image; "
            f"this model has {number}; {_REMEDY}"
        )
    if saved.config.num_visual_tokens is None and number is not None:
        # patch_model would give it learned positions, which the file has no values for.
        raise CheckpointError(
            f"{saved.source} was made for a model that gives each image its own number of visual tokens; this model "
            f"has {number} for every image; {_REMEDY}"
        )
    places = sites.places(family, saved.config, inner)
    if set(places) != {_place_of(name) for name in saved.alignment}:
        raise CheckpointError(
            f"{saved.source} was made for a model with {len({_place_of(name) for name in saved.alignment}) - 1} "
            f"deepstack projectors; this model has {len(places) - 1}; {_REMEDY}"
        )
    if saved.projector:
        quantized = [place + name for place in places for name in precision.quantized_tensors(model, places[place])]
        if quantized:
            raise CheckpointError(
                f"{saved.source} holds a projector that was trained with the adapter, and {listed(sorted(quantized))} "
                f"of this model are quantized: {precision.with_the_projector_as_it_is(model, places.values())}"
            )
        own = {
            place + name: parameter
            for place, projector in places.items()
            for name, parameter in sites.projector_parameters(projector).items()
        }
        reading.check_tensors(saved.projector, own, saved.source)
    _check_range(saved, next(iter(inner.parameters())).dtype)


def _check_range(saved: reading.SavedAdapter, dtype: torch.dtype) -> None:
    """That no value becomes infinite in the dtype that the model runs in, and with it every visual token."""
    largest = torch.finfo(dtype).max if dtype.is_floating_point else math.inf
    read = {name: value for name, value in saved.alignment.items() if not value.is_meta and value.is_floating_point()}
    beyond = [name for name, value in read.items() if bool((value.double().abs() > largest).any())]
    if beyond:
        raise CheckpointError(
            f"{saved.source}: {listed(beyond)} hold values beyond the range of {dtype}, in which this model is: load "
            "the model in bfloat16 or float32"
        )


def check_not_offloaded(model: nn.Module, saved: reading.SavedAdapter, name: str | None) -> None:
    """That everything which will be given new values is there to take them.

    Raises:
        PatchError: if it isn't.
    """
    family = find_family(model)
    taking: list[Tensor] = []
    state = getattr(model, STATE_ATTRIBUTE, None)
    if state is not None and (name or state.active) in state.adapters:
        taking += sites.state_dict(model, name, keep_vars=True).values()
    if saved.projector:
        places = sites.places(family, saved.config, family.inner(model)).values()
        taking += [value for projector in places for value in sites.projector_parameters(projector).values()]
    if any(value.is_meta for value in taking):
        raise PatchError(
            f"{saved.source} holds weights of parts that are offloaded: load_adapter first, then dispatch the model"
        )


def _place_of(name: str) -> str:
    match = sites.DEEPSTACK_PLACE.match(name)
    return match[0] if match else sites.MAIN_PLACE


def check_encoder(
    model: nn.Module, saved: reading.SavedAdapter, instruction_encoder: str | nn.Module | None, *, downloaded: bool
) -> None:
    """That the encoder which a new adapter is going to have fits, and isn't a path that a stranger has named.

    Raises:
        CheckpointError: if the language model's embeddings are of another width.
        EncoderError: if an adapter from the hub names a path of this machine, and the caller doesn't.
    """
    spec = saved.config.instruction_encoder
    if spec == LLM:
        width = embedding_dim(find_family(model).inner(model))
        if saved.config.instruction_dim != width:
            raise CheckpointError(
                f"{saved.source} was made for a language model with embeddings of {saved.config.instruction_dim} "
                f"channels; this model's have {width}; {_REMEDY}"
            )
    elif downloaded and instruction_encoder is None and names_a_path(spec):
        raise EncoderError(
            f"{saved.source} comes from the hub, and names the path {shown(spec)} as its instruction encoder. Only an "
            "adapter that lies on this machine may lead to a path on it: say where the text tower is, "
            "load_adapter(model, …, instruction_encoder=…)"
        )


def _same_build(one: EmmaConfig, other: EmmaConfig, *, ignore_encoder: bool) -> bool:
    """True if both have the same weights and read the same instruction, wherever the encoder is found."""
    ignored: dict[str, Any] = {"cache_size": 0, "kernel": "auto"}
    if ignore_encoder:
        ignored["instruction_encoder"] = "given"
    return one.replace(**ignored) == other.replace(**ignored)


def _differences(one: EmmaConfig, other: EmmaConfig) -> list[str]:
    others = other.to_dict()
    return [f"{name}: {value!r} and {others[name]!r}" for name, value in one.to_dict().items() if value != others[name]]


def _refit(
    model: nn.Module, name: str, processor: Any, instruction_encoder: str | nn.Module | None, kernel: Kernel | None
) -> None:
    """Give an adapter another processor, encoder or kernel, where one is given."""
    state = state_of(model)
    adapter = state.adapters[name]
    config, reader, encoder = adapter.config, adapter.pipeline.reader, adapter.pipeline.encoder
    if processor is not None:
        reader = make_reader(model, config, processor)
    if instruction_encoder is not None:
        config, encoder = resolve_encoder(config, instruction_encoder, state.family.inner(model))
    if kernel is not None:
        config = config.replace(kernel=kernel)
        for alignment in sites.alignments(model, name).values():
            alignment.use_kernel(kernel)
    adapter.config, adapter.pipeline = config, make_pipeline(config, reader, encoder)
