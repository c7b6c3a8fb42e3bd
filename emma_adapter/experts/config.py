"""VisionExpertsConfig: the names and places of a model's vision experts."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from ..messages import listed, shown

#: Stands for the tower's own MLPs, which compute the images that no expert takes.
ORIGINAL = "original"
#: By default: 5 MLPs of SigLIP2-so400m are the paper's 50 million parameters.
DEFAULT_LAYERS = 5
DEFAULT_MARGIN = 0.2
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_MOST_EXPERTS = 64
_MOST_LAYERS = 1024


@dataclass(frozen=True, kw_only=True)
class VisionExpertsConfig:
    """The experts of one model.

    Args:
        experts: their names, in the order they were added.
        layers: how many blocks they are in: the last ones that the model uses.
        margin: by how much an expert's probability must exceed the original's for it to take an image.

    Raises:
        ConfigError: naming the field, the value and what is allowed.
    """

    experts: tuple[str, ...]
    layers: int
    margin: float = DEFAULT_MARGIN

    def __post_init__(self) -> None:
        if isinstance(self.experts, list):
            object.__setattr__(self, "experts", tuple(self.experts))
        if not isinstance(self.experts, tuple) or not 1 <= len(self.experts) <= _MOST_EXPERTS:
            raise self._error("experts", f"the names of 1 to {_MOST_EXPERTS} experts")
        for name in self.experts:
            if not isinstance(name, str) or not _NAME.fullmatch(name) or name == ORIGINAL:
                raise ConfigError(
                    f"an expert's name is made of letters, digits, _ and -, at most 64, and is not {ORIGINAL!r}, which "
                    f"is what computes all other images; got {shown(name)}"
                )
        if len(set(self.experts)) < len(self.experts):
            raise ConfigError(f"there is an expert of that name already: {listed(self.experts)}; choose another")
        if not isinstance(self.layers, int) or isinstance(self.layers, bool) or not 1 <= self.layers <= _MOST_LAYERS:
            raise self._error("layers", f"an integer from 1 to {_MOST_LAYERS}")
        margin = self.margin
        if isinstance(margin, bool) or not isinstance(margin, (int, float)) or not 0 <= margin < 1:
            raise self._error("margin", "a number from 0 up to, but not including, 1")

    def replace(self, **changes: Any) -> VisionExpertsConfig:
        """Return a copy with other values, validated again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types; ``from_dict`` makes an equal config of them."""
        return {"experts": list(self.experts), "layers": self.layers, "margin": self.margin}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> VisionExpertsConfig:
        """Make a config from what ``to_dict`` returned.

        Raises:
            ConfigError: if a field is missing, unknown, or has a value that is not allowed.
        """
        fields = {f.name for f in dataclasses.fields(cls)}
        if not isinstance(values, Mapping) or set(values) != fields:
            raise ConfigError(f"a config of vision experts is an object of {sorted(fields)}; got {shown(values)}")
        return cls(**values)

    def _error(self, name: str, allowed: str) -> ConfigError:
        return ConfigError(f"{name} must be {allowed}; got {shown(getattr(self, name))}")
