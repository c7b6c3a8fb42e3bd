"""Triggers, and the bench that they work on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from emma_adapter import EmmaAdapter, EmmaConfig, EmmaError, patch_model
from tests.support import tiny

from .sites import Site


@dataclass(frozen=True)
class Bench:
    """What a trigger may use: a folder of its own, a monkeypatch, and models made on the spot."""

    folder: Path
    monkeypatch: pytest.MonkeyPatch

    def adapter(self, config: EmmaConfig | None = None, **settings: Any) -> EmmaAdapter:
        """A LLaVA that was patched with a processor; ``adapter.model`` is the model."""
        return patch_model(tiny.llava(), config, **{"processor": tiny.processor(), **settings})

    def saved(self, config: EmmaConfig | None = None, **settings: Any) -> Path:
        """The folder of a saved adapter."""
        self.adapter(config, **settings).save_pretrained(self.folder / "saved")
        return self.folder / "saved"


@dataclass(frozen=True)
class Trigger:
    """What a user does wrong."""

    do: Callable[[Bench], Any]
    error: type[EmmaError]
    path: str
    function: str
    says: str
    """A part of the message as the source has it; ``$`` is its end."""

    def means(self, site: Site) -> bool:
        return (site.path, site.function) == (self.path, self.function) and self.says in f"{site.text}$"


TRIGGERS: list[Trigger] = []


def raises(error: type[EmmaError], where: str, says: str) -> Callable[[Callable[[Bench], Any]], Callable[[Bench], Any]]:
    """Register a trigger of the error that ``where``, as ``"adapter/patch.py:install"``, raises with these words."""
    path, function = where.split(":")
    path = path if path.startswith("integrations/") else f"emma_adapter/{path}"

    def register(do: Callable[[Bench], Any]) -> Callable[[Bench], Any]:
        TRIGGERS.append(Trigger(do, error, path, function, says))
        return do

    return register


def question(text: str = "is there a cat?") -> dict[str, Tensor]:
    """The inputs of a call with one picture."""
    return tiny.chat_inputs([[tiny.user(text)]])
