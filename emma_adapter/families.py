"""The model families there are, by ``config.model_type``."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from .errors import UnsupportedModelError

if TYPE_CHECKING:
    from .integrations.pipeline import ModelFamily

ENTRY_POINT_GROUP = "emma_adapter.integrations"

_FAMILIES: dict[str, ModelFamily] = {}


def register_family(family: ModelFamily) -> ModelFamily:
    """Make a family known under its ``model_types``; it replaces one found through an entry point."""
    for model_type in family.model_types:
        _FAMILIES[model_type] = family
    return family


def family_names() -> tuple[str, ...]:
    """Every supported ``config.model_type``, without importing the families."""
    return tuple(sorted({*_FAMILIES, *_advertised()}))


def find_family(model: Any) -> ModelFamily:
    """The family of a model.

    Raises:
        UnsupportedModelError: if there is none for its ``config.model_type``, or its package can't be imported.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no config.model_type: pass the transformers model itself, not a wrapper "
            "around it (DistributedDataParallel's is .module)"
        )
    if model_type not in _FAMILIES:
        entry = _advertised().get(model_type)
        if entry is None:
            raise UnsupportedModelError(
                f"model_type {model_type!r} is not supported; supported are {list(family_names())}. To add it, subclass "
                "emma_adapter.integrations.pipeline.ModelFamily and call emma_adapter.register_family(YourFamily())"
            )
        _FAMILIES[model_type] = _load(entry)
    return _FAMILIES[model_type]


def _advertised() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=ENTRY_POINT_GROUP)}


def _load(entry: EntryPoint) -> ModelFamily:
    try:
        family: ModelFamily = entry.load()()
    except Exception as error:
        package = entry.dist.name if entry.dist is not None else "unknown"
        raise UnsupportedModelError(
            f"the integration {entry.value!r} for model_type {entry.name!r} (package {package}) can't be loaded: "
            f"{type(error).__name__}: {error}"
        ) from error
    return family
