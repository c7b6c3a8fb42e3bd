"""The registered fusions, by name."""

from __future__ import annotations

from typing import Any

#: Subclasses of :class:`~emma_adapter.Fusion`. This file doesn't import that class: the config, from which a fusion is
#: built, needs the names.
FUSIONS: dict[str, Any] = {}


def fusion_names() -> tuple[str, ...]:
    return tuple(sorted(FUSIONS))
