"""Tiny models of real transformers classes with their real processors, made on the spot."""

from __future__ import annotations

from . import gemma, llava, qwen, tiles
from .entry import Entry, answered
from .rows import Row

__all__ = ["ZOO", "Entry", "Row", "answered"]

ZOO: dict[str, Entry] = {entry.name: entry for family in (llava, qwen, tiles, gemma) for entry in family.ENTRIES}
