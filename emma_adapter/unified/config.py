"""UnifiedConfig: one validated, JSON-serialisable description of what ``unify_model`` adds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ..errors import ConfigError
from ..messages import listed, shown

#: The product of two sizes still fits into 64 bits.
_MAX_SIZE = 2**31 - 1
#: No autoencoder has more channels.
_MAX_CHANNELS = 4096

TimestepDensity = Literal["logit_normal", "uniform"]


@dataclass(frozen=True, kw_only=True)
class UnifiedConfig:
    """The architecture of a model's generation branch, and how it is trained.

    ``unify_model`` fills in what is left None. *paper* marks what arXiv 2512.04810 fixes; all else is our choice, since
    neither its code nor its weights are public (``docs/unified.md`` lists both).

    Args:
        shared_layers: N, how many of the first decoder layers share queries and keys with the base and own values,
            output, MLP and norms; the other layers own everything (*paper*, which doesn't give N). None: half of them.
        decoupling: ``"full"`` copies of the decoupled weights (*paper*), or a rank r: copy = base weight + B·A, with
            B = 0 at the start, which takes a few per cent of the memory. The default is for one GPU.
        latent_channels: C, channels of the autoencoder's latents. None: the autoencoder's.
        compression: how many pixels a latent covers in each direction; 32 in the *paper*. None: the autoencoder's.
        latent_mean: mean of each latent channel, C numbers, subtracted after encoding. None: zeros.
        latent_std: standard deviation of each latent channel, C numbers. None: the autoencoder's
            ``1 / scaling_factor``.
        fuse_understanding: also add the latents of pictures to their visual tokens when the model answers (*paper*).
            With False, answers come from the base alone, without the autoencoder.
        timestep_density: ``"logit_normal"``, u = sigmoid(N(0, 1)), or ``"uniform"``; stratified over the draws of one
            prompt.
        time_shift: s; training times and sampling steps are t = s·u / (1 + (s - 1)·u), 1 being noise. 1 shifts nothing.
        noise_draws: how many noisy copies of a target ``loss`` trains on in one sequence; the prompt is read once.
        prompt_dropout: share of prompts that are replaced by an empty one in training, for classifier-free guidance.
        changed_weight: weight in the loss of the latents that an edit changes; the weight of all others is 1.

    Raises:
        ConfigError: naming the field, the value and what is allowed.
    """

    shared_layers: int | None = None
    decoupling: Literal["full"] | int = 64
    latent_channels: int | None = None
    compression: int | None = None
    latent_mean: tuple[float, ...] | None = None
    latent_std: tuple[float, ...] | None = None
    fuse_understanding: bool = False
    timestep_density: TimestepDensity = "logit_normal"
    time_shift: float = 3.0
    noise_draws: int = 1
    prompt_dropout: float = 0.1
    changed_weight: float = 4.0

    def __post_init__(self) -> None:
        for name in ("latent_mean", "latent_std"):
            self._check_statistics(name)
        if self.shared_layers is not None:
            self._require_int("shared_layers", minimum=0)
        if self.decoupling != "full":
            self._require_int("decoupling", minimum=1, allowed='"full" or a rank, an integer >= 1')
        for name in ("latent_channels", "compression"):
            if getattr(self, name) is not None:
                self._require_int(name, minimum=1)
        if self.latent_channels is not None and self.latent_channels > _MAX_CHANNELS:
            raise self._error("latent_channels", f"an integer <= {_MAX_CHANNELS}")
        self._require_int("noise_draws", minimum=1)
        if not isinstance(self.fuse_understanding, bool):
            raise self._error("fuse_understanding", "True or False")
        densities = get_args(TimestepDensity)
        if self.timestep_density not in densities:
            raise self._error("timestep_density", f"one of {list(densities)}")
        self._require_number("time_shift", above=0.0)
        self._require_number("changed_weight", above=0.0)
        self._require_number("prompt_dropout", above=None)
        if not 0 <= self.prompt_dropout < 1:
            raise self._error("prompt_dropout", "a number from 0 up to, but not including, 1")

    def replace(self, **changes: Any) -> UnifiedConfig:
        """Return a copy with other values, validated again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types; ``UnifiedConfig.from_dict`` makes an equal config of them."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> UnifiedConfig:
        """Make a config from what ``to_dict`` returned.

        Raises:
            ConfigError: if a field is unknown or has a value that is not allowed.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"a config must be a JSON object, not {type(values).__name__}: download or copy it again")
        fields = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - fields, key=repr):
            raise ConfigError(f"unknown config field(s) {listed(unknown)}; known are {sorted(fields)}")
        return cls(**values)

    def _error(self, name: str, allowed: str) -> ConfigError:
        return ConfigError(f"UnifiedConfig.{name} must be {allowed}; got {shown(getattr(self, name))}")

    def _require_int(self, name: str, *, minimum: int, allowed: str | None = None) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= _MAX_SIZE:
            raise self._error(name, allowed or f"an integer from {minimum} to {_MAX_SIZE}")

    def _require_number(self, name: str, *, above: float | None) -> None:
        value = getattr(self, name)
        if not _is_number(value) or (above is not None and value <= above):
            raise self._error(name, "a number" if above is None else f"a number > {above:g}")

    def _check_statistics(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, list):
            value = tuple(value)
            object.__setattr__(self, name, value)
        if value is None:
            return
        least = -math.inf if name == "latent_mean" else 0.0
        if not isinstance(value, tuple) or not all(_is_number(number) and number > least for number in value):
            raise self._error(name, "None or a finite number for each channel, and > 0 for latent_std")
        if self.latent_channels is None:
            object.__setattr__(self, "latent_channels", len(value))
        elif len(value) != self.latent_channels:
            raise self._error(name, f"of latent_channels={self.latent_channels} numbers")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
