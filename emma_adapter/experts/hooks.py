"""Routing calls of the vision tower: hooks on routed blocks and their MLPs, and guards of methods that encode images.

The router chooses from the input of the first routed block where each image goes. The hook behind each MLP then leaves
its output as it is, or overwrites the rows of images that an expert takes: the MLP itself always computes all rows,
because matrix products round differently for other numbers of rows.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..models.feature_calls import FeatureCall
from ..modules import private
from ..modules.gradient_checkpointing import is_recomputing, may_be_recomputed
from ..modules.gradients import with_zero_gradient
from ..modules.method_guard import MethodGuard, arguments_by_name, first_argument
from ..modules.per_thread import PerThread
from ..modules.sharding import are_many_processes
from .routes import Media, Route, choose, require_call
from .scopes import RoutedImage, choice_of, reports_of
from .state import PLACE_ATTRIBUTE, STATE_ATTRIBUTE, ExpertsState


@dataclass(frozen=True)
class _Encoding:
    """The running call of a method that encodes images."""

    inner: nn.Module
    call: FeatureCall
    #: The expert or original that all images go to; None if the router chooses.
    forced: str | None


class _EnoughError(Exception):
    """Ends a call of the vision tower that is made only for the router's input."""

    def __init__(self, pooled: Tensor) -> None:
        super().__init__()
        self.pooled = pooled


class _Running:
    """The running call of a vision tower in this thread."""

    encoding: _Encoding | None = None
    route: Route | None = None
    #: True while only the router's input is computed.
    pools: bool = False
    #: Whether a block is running whose own hooks ran as well.
    inside: bool = False
    #: Whether the block that is running is recomputed by itself.
    recalled: bool = False
    #: True until a call without images has the experts' parameters in its graph.
    ties: bool = False


_RUNNING = PerThread(_Running)


def install(state: ExpertsState, inner: nn.Module, blocks: Sequence[tuple[nn.Module, nn.Module]]) -> None:
    inner.__dict__[STATE_ATTRIBUTE] = state
    inner.register_forward_pre_hook(_before_inner, with_kwargs=True)
    for modality, method in state.feature_methods(inner).items():
        MethodGuard.install(inner, method, functools.partial(_guard_features, modality), STATE_ATTRIBUTE)
    for place, (block, mlp) in enumerate(blocks):
        for module in (block, mlp):
            module.__dict__.update({STATE_ATTRIBUTE: state, PLACE_ATTRIBUTE: place})
        block.register_forward_pre_hook(_before_block, with_kwargs=True)
        block.register_forward_hook(_after_block, always_call=True)
        for child in block.children():
            if child is not mlp:
                child.__dict__[STATE_ATTRIBUTE] = state
                child.register_forward_pre_hook(_before_child, with_kwargs=True)
        mlp.register_forward_hook(_after_mlp, with_kwargs=True)


def remove(module: nn.Module) -> None:
    """Remove this file's hooks and guards from a module, also from a copy of the one that they were installed on."""
    private.remove_hooks(
        module, (_before_inner, _after_embeddings, _before_block, _after_block, _before_child, _after_mlp)
    )
    MethodGuard.remove_all(module, STATE_ATTRIBUTE)
    module.__dict__.pop(PLACE_ATTRIBUTE, None)


def forced_choice(state: ExpertsState) -> str | None:
    """Return the expert or original that all images go to in this thread or task; None if the router chooses."""
    choice = choice_of(state.owner)
    return state.trained if choice is None else choice[0]


def pooled_features(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
    """Return the router's input ``[images, D]`` in a call of ``get_image_features``, computing nothing after it."""
    pooled = None
    _RUNNING.value.pools = True
    try:
        with torch.no_grad():
            method(*args, **kwargs)
    except _EnoughError as end:
        pooled = end.pooled
    finally:
        _RUNNING.value.pools = False
    assert pooled is not None
    return pooled


def _guard_features(modality: str, inner: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Note which images are encoded, their sizes, and what all are forced to go to."""
    if _RUNNING.value.encoding is not None and _RUNNING.value.encoding.inner is inner:
        # Videos are encoded by the method for images.
        return original(*args, **kwargs)
    state: ExpertsState = inner.__dict__[STATE_ATTRIBUTE]
    arguments = arguments_by_name(original, args, kwargs)
    # Releases of transformers give the first parameter different names.
    pixels = arguments.get(next(iter(inspect.signature(original).parameters)))
    call = FeatureCall.of(state.family, modality, pixels, arguments)
    with _encoding(_Encoding(inner, call, _forced(state, inner, pixels))):
        return original(*args, **kwargs)


def _forced(state: ExpertsState, inner: nn.Module, pixels: Any) -> str | None:
    """Return the forced choice, or in recomputation the one of the original call."""
    forced = forced_choice(state)
    first_pixels = next(iter(pixels), None) if isinstance(pixels, (list, tuple)) else pixels
    if not isinstance(first_pixels, Tensor) or not may_be_recomputed(inner):
        return forced
    if not is_recomputing():
        state.forced.remember(first_pixels, (forced,))
        return forced
    remembered = state.forced.recall(first_pixels)
    return forced if remembered is None else remembered[0]


@contextmanager
def _encoding(encoding: _Encoding) -> Iterator[None]:
    previous, _RUNNING.value.encoding = _RUNNING.value.encoding, encoding
    try:
        yield
    finally:
        _RUNNING.value.encoding = previous


def _before_block(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    state = block.__dict__.get(STATE_ATTRIBUTE)
    if not isinstance(state, ExpertsState):
        return None
    hidden, put_back = first_argument(args, kwargs)
    is_first = block.__dict__[PLACE_ATTRIBUTE] == 0
    _RUNNING.value.inside, _RUNNING.value.recalled = True, False
    if not _recall(state, hidden):
        if is_first:
            _RUNNING.value.route = _new_route(state, hidden)
        else:
            require_call(_RUNNING.value.route)
            _RUNNING.value.route = _fitting_route(state, hidden)
        if _RUNNING.value.route is not None and may_be_recomputed(block):
            state.routes.remember(hidden, _RUNNING.value.route)
    return put_back(with_zero_gradient(hidden, _trainable(state))) if is_first and _must_tie() else None


def _before_child(child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Set the route of a block that is recomputed without its own hooks.

    Releases of transformers differ in what they checkpoint, so that the block's hooks may not run again; but its first
    child, a norm, gets the block's input.
    """
    state = child.__dict__.get(STATE_ATTRIBUTE)
    if isinstance(state, ExpertsState) and not _RUNNING.value.inside:
        _recall(state, first_argument(args, kwargs)[0])


def _recall(state: ExpertsState, hidden: Any) -> bool:
    """Set the route of the block that is recomputed with this input, if there is one; return whether there is."""
    remembered = state.routes.recall(hidden) if is_recomputing() and isinstance(hidden, Tensor) else None
    if remembered is not None:
        _RUNNING.value.route, _RUNNING.value.recalled = remembered, True
    return remembered is not None


def _new_route(state: ExpertsState, hidden: Tensor) -> Route:
    encoding, reports = _RUNNING.value.encoding, reports_of(state.owner)
    forced = forced_choice(state) if encoding is None else encoding.forced
    if forced is not None and not _RUNNING.value.pools and not reports:
        return Route.to(forced)
    names, config = state.config.experts, state.config
    if encoding is None and not state.has_feature_methods and hidden.ndim == 3:
        # Custom classes, such as LLaVA's original ones, don't tell which tiles belong to one image.
        modality, media = state.family.modalities[0], Media([1] * len(hidden), packed=False)
    else:
        require_call(encoding)
        assert encoding is not None
        modality, media = encoding.call.modality, Media.of(state.family, encoding.inner, encoding.call, hidden)
    with torch.no_grad():
        pooled = media.pooled(hidden)
        if _RUNNING.value.pools:
            raise _EnoughError(pooled)
        chosen, probabilities = choose(state.module.logits(names, pooled), names, config.margin)
    chosen = chosen if forced is None else [forced] * len(chosen)
    if not is_recomputing():
        for report in reports:
            report.images += map(RoutedImage, [modality] * len(chosen), chosen, probabilities)
    return Route.to(forced) if forced is not None else media.route(chosen, hidden)


def _fitting_route(state: ExpertsState, hidden: Tensor) -> Route | None:
    """Return the running call's route for hidden states that the tower may have merged since the block before."""
    route, encoding = _RUNNING.value.route, _RUNNING.value.encoding
    if route is None or encoding is None or route.fits(hidden):
        return route
    return Media.of(state.family, encoding.inner, encoding.call, hidden).route(route.chosen, hidden)


def _after_block(block: nn.Module, args: Any, output: Any) -> None:
    state = block.__dict__.get(STATE_ATTRIBUTE)
    _RUNNING.value.inside = False
    if not isinstance(state, ExpertsState) or _is_last(state, block):
        _RUNNING.value.route = None


def _is_last(state: ExpertsState, block: nn.Module) -> bool:
    return bool(block.__dict__[PLACE_ATTRIBUTE] == state.config.layers - 1)


def _after_mlp(mlp: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    state, route = mlp.__dict__.get(STATE_ATTRIBUTE), _RUNNING.value.route
    if not isinstance(state, ExpertsState):
        return None
    if route is None:
        if is_recomputing():
            require_call(route)
        return None
    if _RUNNING.value.recalled:
        # A block that is recomputed by itself is followed by another call.
        _RUNNING.value.route, _RUNNING.value.recalled = None, False
    tokens, _ = first_argument(args, kwargs)
    compute = functools.partial(state.module.compute, place=mlp.__dict__[PLACE_ATTRIBUTE], mlp=mlp, tokens=tokens)
    if route.whole is not None:
        return compute(route.whole)
    for name, rows in route.rows.items():
        output = torch.where(rows, compute(name).to(output), output)
    return output


def _trainable(state: ExpertsState) -> list[nn.Parameter]:
    return [parameter for parameter in state.module.parameters() if parameter.requires_grad]


def _must_tie() -> bool:
    """Return whether other processes might wait for gradients that this call doesn't have."""
    return torch.is_grad_enabled() and are_many_processes()


def _before_inner(inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    _RUNNING.value.ties = False
    state = inner.__dict__.get(STATE_ATTRIBUTE)
    if not isinstance(state, ExpertsState) or not _must_tie():
        return None
    names = list(inspect.signature(type(inner).forward).parameters)[1:]
    call = {**dict(zip(names, args, strict=False)), **kwargs}
    if any(call.get(state.family.pixel_arguments[modality]) is not None for modality in state.family.modalities):
        return None
    if isinstance(call.get("inputs_embeds"), Tensor):
        call["inputs_embeds"] = with_zero_gradient(call["inputs_embeds"], _trainable(state))
        return (), call
    embeddings = inner.get_input_embeddings()
    # Checked in each call: the embeddings may have been replaced. The hook is last so that FSDP's don't see the tie.
    if not private.is_last_hook(embeddings, _after_embeddings):
        private.remove_hooks(embeddings, [_after_embeddings])
        embeddings.register_forward_hook(_after_embeddings)
    embeddings.__dict__[STATE_ATTRIBUTE] = state
    _RUNNING.value.ties = True
    return None


def _after_embeddings(embeddings: nn.Module, args: Any, output: Tensor) -> Tensor | None:
    state = embeddings.__dict__.get(STATE_ATTRIBUTE)
    if not _RUNNING.value.ties or not isinstance(state, ExpertsState):
        return None
    _RUNNING.value.ties = False
    return with_zero_gradient(output, _trainable(state))
