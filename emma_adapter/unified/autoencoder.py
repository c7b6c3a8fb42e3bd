"""The autoencoder between pictures and latents: its protocol, and how it is loaded and called."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from os import PathLike
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import AutoencoderError, ConfigError
from ..messages import plain
from .config import UnifiedConfig


class Autoencoder(Protocol):
    """The protocol of an autoencoder, which diffusers' ``AutoencoderDC`` follows.

    Pictures are ``[B, 3, H, W]`` in [-1, 1], latents ``[B, C, H / compression, W / compression]``.
    """

    #: Has ``latent_channels``, and ``scaling_factor``, by which latents are multiplied to have about unit variance.
    config: Any
    #: The compression: how many pixels a latent covers in each direction.
    spatial_compression_ratio: int

    def encode(self, x: Tensor) -> Any:
        """Return an object with the latents as ``.latent``."""

    def decode(self, z: Tensor) -> Any:
        """Return an object with the pictures as ``.sample``."""


class LatentCoder:
    """A frozen autoencoder in float32 that encodes pictures in [0, 1] as normalized latents, and decodes them.

    It isn't a module, which keeps the autoencoder out of the ``state_dict`` of the model that it serves.
    """

    def __init__(self, source: str | PathLike[str] | nn.Module) -> None:
        #: Hub id or folder; None for a module.
        self.source: str | None = None if isinstance(source, nn.Module) else str(source)
        module: Any = source if isinstance(source, nn.Module) else _load(str(source))
        _check_protocol(module)
        self.module = module.requires_grad_(False).eval().float()

    @property
    def channels(self) -> int:
        return int(self.module.config.latent_channels)

    @property
    def compression(self) -> int:
        return int(self.module.spatial_compression_ratio)

    def fingerprint(self) -> str:
        """Return a hash of the autoencoder's config. It identifies the kind of autoencoder, but not its weights."""
        config = self.module.config
        values = dict(config) if isinstance(config, Mapping) else getattr(config, "__dict__", {})
        public_values = {str(name): value for name, value in values.items() if not str(name).startswith("_")}
        text = json.dumps(public_values, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def completed(self, config: UnifiedConfig) -> UnifiedConfig:
        """Return ``config`` with this autoencoder's sizes.

        Raises:
            ConfigError: if it was made for another kind of autoencoder.
        """
        for name, actual in (("latent_channels", self.channels), ("compression", self.compression)):
            expected = getattr(config, name)
            if expected is not None and expected != actual:
                raise ConfigError(
                    f"the autoencoder has {name}={actual}, and the config says {expected}: give the autoencoder that "
                    "it was made for, or leave the field None"
                )
        return config.replace(latent_channels=self.channels, compression=self.compression)

    @torch.no_grad()
    def encode(self, pictures: Tensor, config: UnifiedConfig) -> Tensor:
        """Return the normalized latents ``[B, C, h, w]`` of pictures ``[B, 3, H, W]`` in [0, 1].

        They are in float32, on the pictures' device.

        Raises:
            AutoencoderError: if they aren't finite, or of another shape than the autoencoder's sizes say.
        """
        device = pictures.device
        with torch.autocast(device.type, enabled=False):
            encoded = self.module.encode(self._moved(pictures.float() * 2 - 1))
        latents = getattr(encoded, "latent", None)
        expected = (len(pictures), self.channels, *(side // self.compression for side in pictures.shape[2:]))
        if not isinstance(latents, Tensor) or tuple(latents.shape) != expected:
            raise AutoencoderError(
                f"{type(self.module).__name__}.encode(x).latent should be a tensor {list(expected)} for pictures "
                f"{list(pictures.shape)}, and is {_kind(latents)}: give an autoencoder of the protocol in "
                "docs/unified.md"
            )
        self._check_finite(latents, "latents")
        mean, std = self._statistics(config, latents.device)
        return ((latents.float() - mean) / std).to(device)

    @torch.no_grad()
    def decode(self, latents: Tensor, config: UnifiedConfig) -> Tensor:
        """Return the pictures ``[B, 3, H, W]`` in [0, 1], float32, of normalized latents ``[B, C, h, w]``.

        Raises:
            AutoencoderError: if they aren't finite, or of another shape than the autoencoder's sizes say.
        """
        device = latents.device
        mean, std = self._statistics(config, device)
        with torch.autocast(device.type, enabled=False):
            decoded = self.module.decode(self._moved(latents.float() * std + mean))
        pictures = getattr(decoded, "sample", None)
        expected = (len(latents), 3, *(side * self.compression for side in latents.shape[2:]))
        if not isinstance(pictures, Tensor) or tuple(pictures.shape) != expected:
            raise AutoencoderError(
                f"{type(self.module).__name__}.decode(z).sample should be a tensor {list(expected)} for latents "
                f"{list(latents.shape)}, and is {_kind(pictures)}: give an autoencoder of the protocol in "
                "docs/unified.md"
            )
        self._check_finite(pictures, "pictures")
        return (pictures.float() / 2 + 0.5).clamp(0, 1).to(device)

    @torch.no_grad()
    def measure(self, pictures: Iterable[Tensor]) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return the mean and standard deviation of each latent channel over pictures ``[3, H, W]`` in [0, 1].

        Raises:
            AutoencoderError: if a channel is the same everywhere.
        """
        without_normalization = UnifiedConfig(
            latent_mean=(0.0,) * self.channels, latent_std=(1.0,) * self.channels, compression=self.compression
        )
        channels = [self.encode(picture[None], without_normalization)[0].flatten(1).double() for picture in pictures]
        values = torch.cat(channels, dim=1)
        mean, std = values.mean(1), values.std(1)
        if not bool((std > 0).all()):
            raise AutoencoderError(
                "a latent channel has the same value everywhere in these pictures, or there is only one latent, so "
                "that it has no standard deviation: measure on more pictures"
            )
        return tuple(mean.tolist()), tuple(std.tolist())

    def _moved(self, tensor: Tensor) -> Tensor:
        """Return a tensor on the autoencoder's device; an autoencoder that was loaded here moves to the tensor's."""
        parameter = next(self.module.parameters(), None)
        if parameter is None:
            return tensor
        if self.source is not None and parameter.device != tensor.device:
            self.module.to(tensor.device)
            return tensor
        return tensor.to(parameter.device)

    def _statistics(self, config: UnifiedConfig, device: torch.device) -> tuple[Tensor, Tensor]:
        mean, std = config.latent_mean, config.latent_std
        mean = (0.0,) * self.channels if mean is None else mean
        if std is None:
            std = (1.0 / float(getattr(self.module.config, "scaling_factor", None) or 1.0),) * self.channels
        shaped = [torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (mean, std)]
        return shaped[0], shaped[1]

    def _check_finite(self, values: Tensor, what: str) -> None:
        if not bool(torch.isfinite(values).all()):
            raise AutoencoderError(
                f"{type(self.module).__name__} made {what} with NaN or infinite values, though it ran in float32: look "
                "for such values in its input (a branch that diverged makes them), and in its weights"
            )


def _kind(value: Any) -> str:
    return f"{list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def compression_of(source: str) -> int:
    """Return the compression of the autoencoder at a hub id or in a folder, reading only its config.

    Raises:
        AutoencoderError: if there is no autoencoder.
    """
    return int(_load(source, weights=False).spatial_compression_ratio)


def _load(source: str, *, weights: bool = True) -> Any:
    """Return an autoencoder; without weights, it is on the meta device."""
    try:
        from diffusers import AutoencoderDC
    except ImportError as error:
        raise AutoencoderError(
            "an autoencoder by hub id or folder needs diffusers: pip install emma_adapter[unified], or pass a module"
        ) from error
    try:
        if weights:
            return AutoencoderDC.from_pretrained(source, use_safetensors=True)
        with torch.device("meta"):
            return AutoencoderDC.from_config(AutoencoderDC.load_config(source))
    except Exception as error:
        raise AutoencoderError(
            f"the autoencoder {source!r} can't be loaded ({type(error).__name__}: {plain(str(error), 300)}): give the "
            "hub id or the folder of an AutoencoderDC of diffusers, or a module"
        ) from error


def _check_protocol(module: Any) -> None:
    missing_names = [name for name in ("encode", "decode") if not callable(getattr(module, name, None))]
    sizes = {
        "config.latent_channels": getattr(getattr(module, "config", None), "latent_channels", None),
        "spatial_compression_ratio": getattr(module, "spatial_compression_ratio", None),
    }
    missing_names += [name for name, value in sizes.items() if not isinstance(value, int) or value < 1]
    if missing_names:
        raise AutoencoderError(
            f"{type(module).__name__} can't be the autoencoder: it lacks {', '.join(missing_names)}; docs/unified.md "
            "describes the protocol, which diffusers' AutoencoderDC follows"
        )


def nearest_sizes(height: int, width: int, compression: int) -> tuple[int, int]:
    """Return the multiples of the compression that are nearest to a height and a width, at least one each."""
    nearest = [max(1, math.floor(side / compression + 0.5)) * compression for side in (height, width)]
    return nearest[0], nearest[1]
