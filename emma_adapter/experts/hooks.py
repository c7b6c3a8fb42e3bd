"""How a call of the vision tower is routed: hooks on the routed blocks and their MLPs, and a guard before the methods
that encode images.

The input of the first routed block tells where each image goes. The hook behind each MLP then leaves its output as it
is, or overwrites the rows of images that an expert takes: the MLP itself always computes all rows, because matrix
products round otherwise for other numbers of rows.
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
    """The images that are being encoded."""

    inner: nn.Module
    call: FeatureCall
    #: What all of them go to; None if the router is asked.
    forced: str | None


class _EnoughError(Exception):
    """Ends a call of the vision tower of which only the router's input is wanted."""

    def __init__(self, pooled: Tensor) -> None:
        super().__init__()
        self.pooled = pooled


class _Running:
    """The call of a vision tower in this thread."""

    encoding: _Encoding | None = None
    route: Route | None = None
    #: True while only the router's input is wanted.
    pools: bool = False
    #: Whether a block runs whose own hooks did.
    inside: bool = False
    #: Whether a block is computed again by itself.
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
    """Return what all images of a call go to, in this thread or task; None if the router is asked."""
    choice = choice_of(state.owner)
    return state.trained if choice is None else choice[0]


def pooled_features(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
    """Return the router's input ``[images, D]`` for what ``get_image_features`` is given, and compute nothing after
    it."""
    pooled = None
    _RUNNING.value.pools = True
    try:
        with torch.no_grad():
            method(*args, **kwargs)
    except _EnoughError as found:
        pooled = found.pooled
    finally:
        _RUNNING.value.pools = False
    assert pooled is not None
    return pooled


def _guard_features(modality: str, inner: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Note what is being encoded, in which sizes, and whether the router is asked."""
    if _RUNNING.value.encoding is not None and _RUNNING.value.encoding.inner is inner:
        # Videos are encoded by the method for images.
        return original(*args, **kwargs)
    state: ExpertsState = inner.__dict__[STATE_ATTRIBUTE]
    arguments = arguments_by_name(original, args, kwargs)
    # The first parameter, whatever a release of transformers calls it.
    pixels = arguments.get(next(iter(inspect.signature(original).parameters)))
    call = FeatureCall.of(state.family, modality, pixels, arguments)
    with _encoding(_Encoding(inner, call, _forced(state, inner, pixels))):
        return original(*args, **kwargs)


def _forced(state: ExpertsState, inner: nn.Module, pixels: Any) -> str | None:
    """What is forced, or was when the call was made that is computed again."""
    forced = forced_choice(state)
    given = next(iter(pixels), None) if isinstance(pixels, (list, tuple)) else pixels
    if not isinstance(given, Tensor) or not may_be_recomputed(inner):
        return forced
    if not is_recomputing():
        state.forced.remember(given, (forced,))
        return forced
    known = state.forced.recall(given)
    return forced if known is None else known[0]


@contextmanager
def _encoding(encoding: _Encoding) -> Iterator[None]:
    before, _RUNNING.value.encoding = _RUNNING.value.encoding, encoding
    try:
        yield
    finally:
        _RUNNING.value.encoding = before


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
        if _RUNNING.value.route is not None and may_be_recomputed(block):
            state.routes.remember(hidden, _RUNNING.value.route)
    return put_back(with_zero_gradient(hidden, _trainable(state))) if is_first and _must_tie() else None


def _before_child(child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Where a checkpointed block is computed again, its own hooks needn't run, for releases of transformers differ in
    what they checkpoint; but the first thing in it, a norm, is given what the block was given."""
    state = child.__dict__.get(STATE_ATTRIBUTE)
    if isinstance(state, ExpertsState) and not _RUNNING.value.inside:
        _recall(state, first_argument(args, kwargs)[0])


def _recall(state: ExpertsState, hidden: Any) -> bool:
    """Whether a block is computed again whose input this is; if so, its route is set."""
    known = state.routes.recall(hidden) if is_recomputing() and isinstance(hidden, Tensor) else None
    if known is not None:
        _RUNNING.value.route, _RUNNING.value.recalled = known, True
    return known is not None


def _new_route(state: ExpertsState, hidden: Tensor) -> Route:
    encoding, reports = _RUNNING.value.encoding, reports_of(state.owner)
    forced = forced_choice(state) if encoding is None else encoding.forced
    if forced is not None and not _RUNNING.value.pools and not reports:
        return Route.to(forced)
    names, config = state.config.experts, state.config
    if encoding is None and not state.has_feature_methods and hidden.ndim == 3:
        # Of classes of their own, as LLaVA's original ones: nothing tells which tiles are of one image.
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
        # What follows a block that is computed again by itself is another call.
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
    """Whether other processes wait for gradients that this call might not have."""
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
    # Each time: other embeddings may have taken their place. After all other hooks: FSDP's must not see the tie.
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
