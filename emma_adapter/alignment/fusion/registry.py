"""The fusions there are, by name."""

from __future__ import annotations

from typing import Any

#: The classes, each a :class:`~emma_adapter.Fusion`. This file doesn't know that class, so that a config, which the
#: class is made from, can ask for the names.
FUSIONS: dict[str, Any] = {}


def fusion_names() -> tuple[str, ...]:
    return tuple(sorted(FUSIONS))
