"""Tiny models of real transformers classes with their real processors, made on the spot."""

from __future__ import annotations

from . import (
    cohere,
    gemma,
    gemma3n,
    gemma4,
    glm,
    kimi,
    lfm2_vl,
    llava,
    minicpm_v,
    molmo2,
    ovis2,
    qwen,
    qwen_omni,
    tiles,
)
from .entry import Entry, answered
from .rows import Row

__all__ = ["ZOO", "Entry", "Row", "answered"]

FAMILIES = (llava, qwen, tiles, gemma, gemma4, glm, cohere, gemma3n, ovis2, molmo2, qwen_omni, kimi, minicpm_v, lfm2_vl)
ZOO: dict[str, Entry] = {entry.name: entry for family in FAMILIES for entry in family.ENTRIES}
