"""The cross-modal step of ``attention`` and ``modulation``. See ``op.py``."""

from __future__ import annotations

from collections.abc import Iterator

from ..launch import Configuration
from . import forward, gradients, instruction
from .instruction import keys_and_values
from .op import cross_attention, cross_attention_reference, unsupported_reason

__all__ = ["configurations", "cross_attention", "cross_attention_reference", "keys_and_values", "unsupported_reason"]


def configurations() -> Iterator[Configuration]:
    """Yield every variant of every kernel that :func:`cross_attention`, its backward and its keys can launch."""
    yield from instruction.configurations()
    yield from forward.configurations()
    yield from gradients.configurations()
