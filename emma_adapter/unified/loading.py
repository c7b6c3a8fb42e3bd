"""load_unified: from a saved folder to a model that draws."""

from __future__ import annotations
