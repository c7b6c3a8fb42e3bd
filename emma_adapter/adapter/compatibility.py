"""Checks that a saved adapter was made for a model like this one."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints import reading
from ..checkpoints.format import SavedAdapter
from ..errors import CheckpointError, EncoderError, PatchError
from ..instructions.encoders import names_a_path
from ..instructions.pipeline import LLM
from ..messages import listed, shown
from ..models.projected_tokens import token_sizes
from ..models.registry import find_family
from ..modules.method_guard import STATE_ATTRIBUTE
from ..patching import precision, sites
from .config_from_model import embedding_dim

_REMEDY = "load it into the model it was made for"


def check_fit(model: nn.Module, saved: SavedAdapter) -> None:
    """Check, before anything is changed, that the saved adapter was made for a model like this one."""
    family = find_family(model)
    inner = family.inner(model)
    config: Any = model.config
    if saved.model_type != config.model_type:
        raise CheckpointError(
            f"{saved.source} was made for model_type {shown(saved.model_type)}; this model is {config.model_type!r}: "
            f"{_REMEDY}"
        )
    visual_dim, number, _ = token_sizes(family, inner, projected=saved.config.aligns_projected)
    if saved.config.visual_dim != visual_dim:
        trained_on = "language model" if saved.config.aligns_projected else "vision tower"
        raise CheckpointError(
            f"{saved.source} was made for visual tokens of {saved.config.visual_dim} channels; this model's have "
            f"{visual_dim}: it was trained on another {trained_on}; {_REMEDY}"
        )
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
        parameters = {
            place + name: parameter
            for place, projector in places.items()
            for name, parameter in sites.projector_parameters(projector).items()
        }
        reading.check_tensors(saved.projector, parameters, saved.source)
    _check_range(saved, next(iter(inner.parameters())).dtype)


def _check_range(saved: SavedAdapter, dtype: torch.dtype) -> None:
    """Check that no value becomes infinite, and with it every visual token, in the dtype that the model runs in."""
    largest = torch.finfo(dtype).max if dtype.is_floating_point else math.inf
    values = {name: value for name, value in saved.alignment.items() if not value.is_meta and value.is_floating_point()}
    beyond = [name for name, value in values.items() if bool((value.double().abs() > largest).any())]
    if beyond:
        raise CheckpointError(
            f"{saved.source}: {listed(beyond)} hold values beyond the range of {dtype}, in which this model is: load "
            "the model in bfloat16 or float32"
        )


def check_not_offloaded(model: nn.Module, saved: SavedAdapter, name: str | None) -> None:
    """Check that nothing which will be given new values is offloaded.

    Raises:
        PatchError: if something is.
    """
    family = find_family(model)
    alignment_tensors: list[Tensor] = []
    state = getattr(model, STATE_ATTRIBUTE, None)
    projector_tensors: list[Tensor] = []
    if state is not None and (name or state.active) in state.adapters:
        alignment_tensors += state.adapters[name or state.active].state_dict(keep_vars=True).values()
        projector_tensors += state.adapters[name or state.active].projector_parameters().values()
    if saved.projector and not projector_tensors:
        places = sites.places(family, saved.config, family.inner(model)).values()
        # The adapter will get copies of these.
        for projector in places:
            projector_tensors += sites.projector_parameters(projector).values()
    if any(value.is_meta for value in (*alignment_tensors, *projector_tensors)):
        raise PatchError(
            f"{saved.source} holds weights of parts that are offloaded: load_adapter first, then dispatch the model"
        )


def _place_of(name: str) -> str:
    match = sites.DEEPSTACK_PLACE.match(name)
    return match[0] if match else sites.MAIN_PLACE


def check_encoder(
    model: nn.Module, saved: SavedAdapter, instruction_encoder: str | nn.Module | None, *, downloaded: bool
) -> None:
    """Check that the encoder which a new adapter is going to have fits, and isn't a path that a stranger has named.

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
