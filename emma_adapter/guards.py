"""Guards: what stands before two methods of one patched model, as attributes of that instance."""

from __future__ import annotations

import copy
import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from .hooks import pop_instruction
from .state import STATE_ATTRIBUTE, CallPlan, OuterCall, state_of


class MethodGuard:
    """Stands before a method of one model, as an attribute of that instance.

    ``guard(model, original, *args, **kwargs)`` is called instead; ``original`` is the method as it was, bound.
    The model is held weakly, and a copy or pickle of the model carries a guard of its own.
    """

    def __init__(self, model: nn.Module, name: str, guard: Callable[..., Any]) -> None:
        self.name = name
        self.guard = guard
        #: What another tool had put on the instance under this name before.
        self.previous = model.__dict__.get(name)
        self._model = weakref.ref(model)

    @classmethod
    def install(cls, model: nn.Module, name: str, guard: Callable[..., Any]) -> None:
        model.__dict__[name] = cls(model, name, guard)

    def remove(self, model: nn.Module) -> None:
        if model.__dict__.get(self.name) is not self:
            return  # another tool wrapped us since; without state, the guard only passes calls on
        if self.previous is None:
            del model.__dict__[self.name]
        else:
            model.__dict__[self.name] = self.previous

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self._living_model()
        original = self.previous or functools.partial(getattr(type(model), self.name), model)
        if not hasattr(model, STATE_ATTRIBUTE):
            return original(*args, **kwargs)
        return self.guard(model, original, *args, **kwargs)

    @property
    def __wrapped__(self) -> Any:
        return self.previous or getattr(type(self._living_model()), self.name)

    @property
    def __signature__(self) -> inspect.Signature:
        signature = inspect.signature(self.__wrapped__)
        return signature if self.previous else signature.replace(parameters=list(signature.parameters.values())[1:])

    def __deepcopy__(self, memo: dict[int, Any]) -> MethodGuard:
        twin = object.__new__(type(self))
        twin.name, twin.guard, twin.previous = self.name, self.guard, copy.deepcopy(self.previous, memo)
        # nn.Module registers its copy before it copies its attributes.
        model = self._living_model()
        twin._model = weakref.ref(memo.get(id(model), model))
        return twin

    def _living_model(self) -> nn.Module:
        model = self._model()
        if model is None:
            raise ReferenceError(f"the model of this {self.name} no longer exists")
        return model

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "guard": self.guard, "previous": self.previous, "model": self._model()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.name, self.guard, self.previous = state["name"], state["guard"], state["previous"]
        self._model = weakref.ref(state["model"])


def guard_generate(model: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Read the instruction from the prompt before ``generate`` starts: it may encode images before any forward,
    and later calls of forward no longer see the prompt alone."""
    state = state_of(model)
    instruction, mask = pop_instruction(kwargs)
    if state.context.disabled or not state.has_pixels(kwargs):
        return original(*args, **kwargs)
    inner = state.family.inner(model)
    ids = args[0] if args else kwargs.get("inputs")
    ids = kwargs.get("input_ids") if ids is None else ids
    embeds = kwargs.get("inputs_embeds")
    # A continued conversation: the images of this call belong to what the cache doesn't hold yet.
    known = _cached_length(kwargs.get("past_key_values"))
    placeholders = state.placeholders(inner, None if ids is None else ids[:, known:], embeds)
    outer = OuterCall(None, instruction, mask)
    tokens = state.instruction_tokens(inner, outer, placeholders, ids, embeds, kwargs.get("attention_mask"))
    plan = CallPlan(inner, tokens, placeholders, state.sizes(kwargs))
    with state.generating(plan):
        return original(*args, **kwargs)


def _cached_length(cache: Any) -> int:
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0
