"""Guards: what stands before a few methods of one patched model, as attributes of that instance."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from .calls import CallPlan, FeatureCall
from .hooks import pop_outer_call
from .parallel import look_up
from .planning import cached_length, has_pixels, plan_call
from .recomputation import is_recomputing, may_be_recomputed
from .state import STATE_ATTRIBUTE, AdapterState, state_of


class MethodGuard:
    """Stands before a method of one model, as an attribute of that instance.

    ``guard(model, original, *args, **kwargs)`` is called instead; ``original`` is the method as it was, bound.
    The model is held weakly, so that deleting it frees its memory at once, and a copy or pickle of the model carries a
    guard of its own. Like a bound method, a guard that is held itself still works without the model: it is looked up on
    one that is deleted before the call, as in ``PeftModel.from_pretrained(model, path).merge_and_unload()``.
    """

    def __init__(self, model: nn.Module, name: str, guard: Callable[..., Any], switch: str = STATE_ATTRIBUTE) -> None:
        self.name = name
        self.guard = guard
        #: The attribute of the model without which the guard only passes calls on.
        self.switch = switch
        #: What another tool had put on the instance under this name before.
        self.previous = model.__dict__.get(name)
        self._bind(model)

    @classmethod
    def install(cls, model: nn.Module, name: str, guard: Callable[..., Any], switch: str = STATE_ATTRIBUTE) -> None:
        model.__dict__[name] = cls(model, name, guard, switch)

    @classmethod
    def install_once(cls, model: nn.Module, name: str, guard: Callable[..., Any]) -> None:
        """Install a guard before a method that the model's class has, unless it is there already."""
        present = model.__dict__.get(name)
        if hasattr(type(model), name) and not (isinstance(present, cls) and present.guard is guard):
            cls.install(model, name, guard)

    def remove(self, model: nn.Module) -> None:
        if model.__dict__.get(self.name) is not self:
            return  # another tool wrapped us since; without state, the guard only passes calls on
        if self.previous is None:
            del model.__dict__[self.name]
        else:
            model.__dict__[self.name] = self.previous

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self._model_or_twin()
        original = self.previous or functools.partial(getattr(type(model), self.name), model)
        if not hasattr(model, self.switch):
            return original(*args, **kwargs)
        return self.guard(model, original, *args, **kwargs)

    @property
    def __wrapped__(self) -> Any:
        return self.previous or getattr(type(self._model_or_twin()), self.name)

    @property
    def __signature__(self) -> inspect.Signature:
        signature = inspect.signature(self.__wrapped__)
        return signature if self.previous else signature.replace(parameters=list(signature.parameters.values())[1:])

    def __deepcopy__(self, memo: dict[int, Any]) -> MethodGuard:
        twin = object.__new__(type(self))
        twin.name, twin.guard, twin.switch = self.name, self.guard, self.switch
        twin.previous = copy.deepcopy(self.previous, memo)
        # nn.Module registers its copy before it copies its attributes.
        model = self._model_or_twin()
        twin._bind(memo.get(id(model), model))
        return twin

    def bound_to(self, model: nn.Module) -> MethodGuard:
        """This guard for a shallow copy of its model."""
        twin = object.__new__(type(self))
        twin.name, twin.guard, twin.switch, twin.previous = self.name, self.guard, self.switch, self.previous
        twin._bind(model)
        return twin

    def _bind(self, model: nn.Module) -> None:
        # As Python ends, names of this module may be gone before the model is.
        guard, kind = weakref.ref(self), type(self)

        def outlive(_: object) -> None:
            # The model is about to be freed, and its attributes with it, unless somebody holds this guard.
            if (own := guard()) is not None:
                own._attributes = {n: v for n, v in own._attributes.items() if not isinstance(v, kind)}

        self._type = type(model)
        self._attributes: dict[str, Any] = model.__dict__
        self._model = weakref.ref(model, outlive)

    def _model_or_twin(self) -> nn.Module:
        """The model, or one with its attributes if it was deleted while this guard was held."""
        model = self._model()
        if model is None:
            model = object.__new__(self._type)
            model.__dict__.update(self._attributes)
        return model

    def __getstate__(self) -> dict[str, Any]:
        own = {"name": self.name, "guard": self.guard, "switch": self.switch, "previous": self.previous}
        return {**own, "model": self._model_or_twin()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.name, self.guard, self.switch = state["name"], state["guard"], state["switch"]
        self.previous = state["previous"]
        self._bind(state["model"])


def guard_generate(model: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Read the instruction from the prompt before ``generate`` starts: it may encode images before any forward,
    and later calls of forward no longer see the prompt alone."""
    state = state_of(model)
    # What it is given holds no answer, also in the midst of training.
    own = dataclasses.replace(pop_outer_call(kwargs), records_gradients=False)
    arguments = arguments_by_name(original, args, kwargs)
    if state.scope.disabled:
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
    plan = plan_call(state, inner, own, arguments, cached=cached)
    prompt = arguments.get("input_ids")
    with state.generating(plan, None if prompt is None else prompt[:, cached:]):
        return original(*args, **kwargs)


def guard_features(modality: str, inner: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Note which modality is being encoded, and in what sizes."""
    state = state_of(inner)
    arguments = arguments_by_name(original, args, kwargs)
    # The first parameter, whatever a release of transformers calls it.
    pixels = arguments.get(next(iter(inspect.signature(original).parameters)))
    with (
        _call_of_features(state, inner, pixels),
        state.encoding(FeatureCall.of(state.family, modality, pixels, arguments)),
    ):
        return original(*args, **kwargs)


def _call_of_features(state: AdapterState, inner: nn.Module, pixels: Any) -> AbstractContextManager[None]:
    """What the call knew that a feature method belongs to, if the method is computed again without it."""
    context, memory = state.context, state.memories.features
    pixels = next(iter(pixels), None) if isinstance(pixels, (list, tuple)) else pixels
    if not isinstance(pixels, Tensor) or context.feature_call is not None:
        return nullcontext()
    if not is_recomputing():
        if context.plan is None and may_be_recomputed(inner):
            memory.remember(pixels, state.scope)
        elif context.plan is not None and context.pinned is None and context.may_be_recomputed:
            plan = context.plan
            memory.remember(pixels, plan.without_model() if isinstance(plan, CallPlan) else plan)
    elif context.plan is None and context.recomputed is None:
        known = memory.recall(pixels)
        if known is not None:
            return state.recomputing(inner, known)
    return nullcontext()


def guard_replication(module: nn.Module, original: Callable[[], nn.Module]) -> nn.Module:
    """Let a replica, which ``nn.DataParallel`` makes for each device and call, be a patched model of its own: a copied
    guard would run the methods of the model it was made for, and the replica's thread is in no block of this one."""
    replica = original()
    for name, value in list(replica.__dict__.items()):
        if isinstance(value, MethodGuard):
            replica.__dict__[name] = value.bound_to(replica)
    setattr(replica, STATE_ATTRIBUTE, state_of(module).for_replica())
    return replica


def arguments_by_name(method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of a bound method, those given by position too."""
    return {**dict(zip(inspect.signature(method).parameters, args, strict=False)), **kwargs}
