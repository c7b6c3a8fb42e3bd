"""The registry of model families, which finds the one of a model by ``config.model_type``, or by its class.

Register a family with ``register_family``, or from a package of your own through the entry-point group
``emma_adapter.integrations``: the entry's name is the model type, its value the class.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Any

from torch import nn

from ..errors import UnsupportedModelError
from .class_names import image_text_classes
from .families import ModelFamily
from .unsupported import raise_unsupported

ENTRY_POINT_GROUP = "emma_adapter.integrations"

_FAMILIES: dict[str, ModelFamily] = {}


def register_family(family: ModelFamily) -> ModelFamily:
    """Register a family under its ``model_types``, in place of any other, and return it.

    Raises:
        UnsupportedModelError: if it isn't an instance of :class:`ModelFamily`, but a class, for example, or names its
            model types, modalities or sizes by anything but sequences of strings.
    """
    _check(family)
    for model_type in family.model_types:
        _FAMILIES[model_type] = family
    return family


def _check(family: Any) -> None:
    if not isinstance(family, ModelFamily):
        raise UnsupportedModelError(
            "register_family takes an instance of a subclass of emma_adapter.ModelFamily: "
            f"register_family(YourFamily()); got {family if isinstance(family, type) else type(family)}"
        )
    for name in ("model_types", "modalities", "size_arguments"):
        names = getattr(family, name, None)
        if not isinstance(names, (tuple, list)) or not all(isinstance(entry, str) for entry in names):
            raise UnsupportedModelError(
                f"{type(family).__name__}.{name} must be a tuple of strings, such as ('llava',); got {names!r}"
            )


def family_names() -> tuple[str, ...]:
    """Return every supported ``config.model_type``, without importing the families."""
    return tuple(sorted({*_FAMILIES, *_advertised()}))


def require_model(model: Any) -> None:
    """Check that ``model`` is a model.

    Raises:
        UnsupportedModelError: if it isn't, but a model's name, for example.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"a model is needed, as AutoModelForImageTextToText.from_pretrained(…) returns it; got a "
            f"{type(model).__name__} (the model of a handle is adapter.model)"
        )


def find_family(model: Any) -> ModelFamily:
    """Return the family of a model.

    Raises:
        UnsupportedModelError: if there is none for its ``config.model_type``, or its package can't be imported.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no config.model_type: pass the transformers model itself, not a wrapper "
            "around it (DistributedDataParallel's is .module)"
        )
    family = _registered(model_type) or _by_class(type(model))
    return raise_unsupported(model, model_type, family_names()) if family is None else family.for_model(model)


def _registered(model_type: str) -> ModelFamily | None:
    if model_type not in _FAMILIES and (entry := _advertised().get(model_type)) is not None:
        _FAMILIES[model_type] = _load(entry)
    return _FAMILIES.get(model_type)


def _by_class(model_class: type[nn.Module]) -> ModelFamily | None:
    """Return the family of a class of transformers, or of its subclass, whose config goes by another model type."""
    classes = image_text_classes()
    types = {class_name: model_type for model_type in family_names() for class_name in classes.get(model_type, ())}
    for ancestor in model_class.__mro__:
        if ancestor.__module__.startswith("transformers.models.") and ancestor.__name__ in types:
            return _registered(types[ancestor.__name__])
    return None


def _advertised() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=ENTRY_POINT_GROUP)}


def _load(entry: EntryPoint) -> ModelFamily:
    try:
        family: ModelFamily = entry.load()()
        _check(family)
    except Exception as error:
        package = entry.dist.name if entry.dist is not None else "unknown"
        raise UnsupportedModelError(
            f"the integration {entry.value!r} for model_type {entry.name!r} (package {package}) can't be loaded "
            f"({type(error).__name__}: {error}): install what it needs, or a release of it that fits this environment"
        ) from error
    return family
