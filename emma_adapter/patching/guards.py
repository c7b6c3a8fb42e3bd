"""Guards around a few methods of one patched model, set as attributes of that instance."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from ..models.feature_calls import FeatureCall
from ..modules.method_guard import STATE_ATTRIBUTE, MethodGuard, arguments_by_name
from .hooks import pop_outer_call
from .planning import cached_length, has_pixels, plan_call
from .recomputation import call_of_features
from .state import state_of
from .without_images import look_up


def guard_generate(model: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Read the instruction from the prompt before ``generate`` starts.

    It may encode images before any forward, and later calls of forward no longer see the prompt alone.
    """
    state = state_of(model)
    # A prompt to generate from holds no answer, even in the midst of training.
    outer = dataclasses.replace(pop_outer_call(kwargs), records_gradients=False)
    arguments = arguments_by_name(original, args, kwargs)
    if state.scope.disabled or arguments.get("generation_mode") not in (None, "text"):
        # Image generation passes the prompt, among others, to forward, where it is read.
        return original(*args, **kwargs)
    if arguments.get("inputs") is not None:
        arguments["input_ids"] = arguments["inputs"]
    inner = state.family.inner(model)
    if not has_pixels(state.family, arguments):
        look_up(state, inner, arguments)
        with state.generating_without_images():
            return original(*args, **kwargs)
    # A continued conversation: the images of this call belong to what the cache doesn't hold yet.
    cached = cached_length(arguments)
    plan = plan_call(state, inner, outer, arguments, cached=cached)
    prompt = arguments.get("input_ids")
    with state.generating(plan, None if prompt is None else prompt[:, cached:]):
        return original(*args, **kwargs)


def guard_features(modality: str, inner: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Note which modality a feature method encodes, and in which sizes."""
    state = state_of(inner)
    arguments = arguments_by_name(original, args, kwargs)
    # The first parameter, whatever a release of transformers calls it.
    pixels = arguments.get(next(iter(inspect.signature(original).parameters)))
    with (
        call_of_features(state, inner, pixels),
        state.encoding(FeatureCall.of(state.family, modality, pixels, arguments)),
    ):
        return original(*args, **kwargs)


def guard_replication(module: nn.Module, original: Callable[[], nn.Module]) -> nn.Module:
    """Make the replica that ``nn.DataParallel`` runs, one for each device and call, a patched model of its own.

    A copied guard would run the methods of the model it was made for, and the replica's thread is in no block of this
    one.
    """
    replica = original()
    for name, value in list(replica.__dict__.items()):
        if isinstance(value, MethodGuard):
            replica.__dict__[name] = value.bound_to(replica)
    setattr(replica, STATE_ATTRIBUTE, state_of(module).for_replica())
    return replica
