"""The paper's fusion as one product with virtual concatenation. See ``op.py``."""

from __future__ import annotations

from collections.abc import Iterator

from ..launch import Configuration
from . import backward, forward
from .op import token_mixing, token_mixing_reference, unsupported_reason

__all__ = ["configurations", "token_mixing", "token_mixing_reference", "unsupported_reason"]


def configurations() -> Iterator[Configuration]:
    """Yield every variant of every kernel that :func:`token_mixing` and its backward can launch."""
    yield from forward.configurations()
    yield from backward.configurations()
