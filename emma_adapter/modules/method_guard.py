"""A guard that stands before a method of one model."""

from __future__ import annotations

import copy
import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

#: Attribute of the outer model, the inner model and the projectors of a patched model.
STATE_ATTRIBUTE = "_emma"


class MethodGuard:
    """A guard before a method of one model, as an attribute of that instance.

    ``guard(model, original, *args, **kwargs)`` is called instead; ``original`` is the method as it was, bound.
    The model is held weakly, so that deleting it frees its memory at once, and a copy or pickle of the model carries a
    guard of its own. Like a bound method, a guard that is held itself still works without the model: in
    ``PeftModel.from_pretrained(model, path).merge_and_unload()``, the model is gone between the look-up and the call.
    """

    def __init__(self, model: nn.Module, name: str, guard: Callable[..., Any], switch: str = STATE_ATTRIBUTE) -> None:
        self.name = name
        self.guard = guard
        #: The attribute of the model without which the guard only passes calls on.
        self.switch = switch
        #: What another tool had put on the instance under this name before, if any did.
        self.previous = model.__dict__.get(name)
        self._bind(model)

    @classmethod
    def install(cls, model: nn.Module, name: str, guard: Callable[..., Any], switch: str = STATE_ATTRIBUTE) -> None:
        model.__dict__[name] = cls(model, name, guard, switch)

    @classmethod
    def install_once(
        cls, model: nn.Module, name: str, guard: Callable[..., Any], switch: str = STATE_ATTRIBUTE
    ) -> None:
        """Install a guard before a method that the model's class has, unless it is there already."""
        present = model.__dict__.get(name)
        if hasattr(type(model), name) and not (isinstance(present, cls) and present.guard is guard):
            cls.install(model, name, guard, switch)

    @classmethod
    def remove_all(cls, model: nn.Module, switch: str) -> None:
        """Remove every guard with this switch from a model."""
        for value in list(vars(model).values()):
            for guard in [guard for guard in _chain(value) if guard.switch == switch]:
                guard.remove(model)

    def remove(self, model: nn.Module) -> None:
        """Remove the guard, even from behind guards that were installed later."""
        present = model.__dict__.get(self.name)
        if present is self:
            if self.previous is None:
                del model.__dict__[self.name]
            else:
                model.__dict__[self.name] = self.previous
        # A guard that another tool has wrapped stays, and only passes calls on, since the switch is gone.
        for later_guard in _chain(present):
            if later_guard.previous is self:
                later_guard.previous = self.previous

    def before(self, original: Callable[..., Any]) -> MethodGuard:
        """Return a copy of this guard, and of those installed before it, that stands before another method."""
        twin = self.bound_to(self._model_or_twin())
        twin.previous = self.previous.before(original) if isinstance(self.previous, MethodGuard) else original
        return twin

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
        """Return a copy of this guard for a shallow copy of its model."""
        twin = object.__new__(type(self))
        twin.name, twin.guard, twin.switch, twin.previous = self.name, self.guard, self.switch, self.previous
        twin._bind(model)
        return twin

    def _bind(self, model: nn.Module) -> None:
        # When Python exits, the names of this module may be gone before the model.
        reference, kind = weakref.ref(self), type(self)

        def outlive(_: object) -> None:
            # The model is about to be freed. Its attributes outlive it only in a guard that somebody holds.
            if (guard := reference()) is not None:
                attributes = guard._attributes.items()
                guard._attributes = {name: value for name, value in attributes if not isinstance(value, kind)}

        self._type = type(model)
        self._attributes: dict[str, Any] = model.__dict__
        self._model = weakref.ref(model, outlive)

    def _model_or_twin(self) -> nn.Module:
        """Return the model, or one with its attributes if it was deleted while this guard was held."""
        model = self._model()
        if model is None:
            model = object.__new__(self._type)
            model.__dict__.update(self._attributes)
        return model

    def __getstate__(self) -> dict[str, Any]:
        attributes = {"name": self.name, "guard": self.guard, "switch": self.switch, "previous": self.previous}
        return {**attributes, "model": self._model_or_twin()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.name, self.guard, self.switch = state["name"], state["guard"], state["switch"]
        self.previous = state["previous"]
        self._bind(state["model"])


def _chain(value: object) -> list[MethodGuard]:
    """Return a guard, and those that were installed before it."""
    guards = []
    while isinstance(value, MethodGuard):
        guards.append(value)
        value = value.previous
    return guards


def arguments_by_name(method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call of a bound method by name, including those given by position."""
    return {**dict(zip(inspect.signature(method).parameters, args, strict=False)), **kwargs}


def first_tensor(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Callable[[Tensor], tuple[tuple[Any, ...], dict[str, Any]]]] | None:
    """Return the first floating-point tensor of a call, and a function that returns all arguments with another for it.

    None if the call has none: some modules that project visual tokens embed token ids in other calls.
    """
    arguments: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for key, value in arguments:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value, functools.partial(_with_another, args, kwargs, key)
    return None


def _with_another(
    args: tuple[Any, ...], kwargs: dict[str, Any], key: int | str, value: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(key, str):
        return args, {**kwargs, key: value}
    return (*args[:key], value, *args[key + 1 :]), kwargs


def first_argument(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Callable[[Tensor], tuple[tuple[Any, ...], dict[str, Any]]]]:
    """Return the first argument of a call, and a function that returns all of them with another in its place."""
    if args:
        return args[0], lambda value: ((value, *args[1:]), kwargs)
    name = next(iter(kwargs))
    return kwargs[name], lambda value: ((), {**kwargs, name: value})
