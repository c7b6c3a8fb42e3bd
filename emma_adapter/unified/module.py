"""UnifiedModule: all trained and saved parameters of a generation branch."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modules import sharding
from ..modules.views import wide
from .config import UnifiedConfig
from .layers import decoupled_parameters, generation_view, text_model_of

_TIME_CHANNELS = 256


class UnifiedModule(nn.Module):
    """The generation branch's parameters, beside the base's.

    All are in flat ParameterDicts, without an ``nn.Linear`` that tools which go by names or classes of modules, such as
    PEFT, would take for one of the model's.

    Args:
        config: with all sizes filled in.
        inner: the base's module whose ``forward`` takes pixels and token ids.
    """

    def __init__(self, config: UnifiedConfig, inner: nn.Module) -> None:
        super().__init__()
        text: Any = text_model_of(inner)
        layers = list(text.layers)
        shared = shared_layers(config, len(layers))
        self.layers = nn.ModuleList(
            nn.ParameterDict(decoupled_parameters(layer, config.decoupling, shares_queries=number < shared))
            for number, layer in enumerate(layers)
        )
        self.norm = nn.ParameterDict(decoupled_parameters(text.norm, config.decoupling, shares_queries=False))
        embedding: Tensor = text.embed_tokens.weight
        width, channels = text.embed_tokens.embedding_dim, config.latent_channels
        assert channels is not None
        device = sharding.computing_device(text.norm)
        settings: dict[str, Any] = {"device": device, "dtype": wide(embedding.dtype)}
        #: C → D: noisy latents as tokens.
        self.latents = _linear(channels, width, settings)
        self.time = nn.ParameterDict(
            {f"in_{name}": value for name, value in _linear(_TIME_CHANNELS, width, settings).items()}
            | {f"out_{name}": value for name, value in _linear(width, width, settings).items()}
        )
        #: D → C, zeros at the start.
        self.velocity = nn.ParameterDict(
            {
                "weight": nn.Parameter(torch.zeros(channels, width, **settings)),
                "bias": nn.Parameter(torch.zeros(channels, **settings)),
            }
        )
        #: u → u + dW·u + W_g·g at reference pictures, zeros at the start.
        self.fusion = nn.ParameterDict(_fusion(config, width, channels, settings))
        # Needed even with M-RoPE, which tells a token where keys are relative to it, but not where it is itself.
        self.position = nn.ParameterDict({"scale": nn.Parameter(torch.ones((), **settings))})

    def stack(self, text: nn.Module, dtype: torch.dtype, *, training: bool | None = None) -> nn.Module:
        """Return the decoder stack of this branch; see :func:`~.layers.generation_view`."""
        layers = [dict(parameters.items()) for parameters in self.layers]  # type: ignore[operator]
        return generation_view(text, layers, dict(self.norm.items()), dtype, training=training)

    def embed(self, x: Tensor, t: Tensor, grid: Tensor) -> Tensor:
        """Return tokens ``[B, R, N, D]`` of noisy latents.

        Args:
            x: ``[B, R, N, C]``, R noisy copies of N latents.
            t: ``[B, R]``, the times of the copies.
            grid: ``[B, N, 2]``, row and column of each latent.
        """
        parameters = self.time
        dtype = self.latents["weight"].dtype
        angles = sinusoid(t.to(wide(t.dtype)) * 1000, _TIME_CHANNELS).to(dtype)
        time = F.linear(angles, parameters["in_weight"], parameters["in_bias"])
        time = F.linear(F.silu(time), parameters["out_weight"], parameters["out_bias"])
        tokens = F.linear(x.to(dtype), self.latents["weight"], self.latents["bias"]) + time[:, :, None]
        places = _sinusoid_2d(grid, tokens.shape[-1]).to(tokens.dtype)
        return tokens + self.position["scale"] * places[:, None]

    def read_velocity(self, hidden: Tensor) -> Tensor:
        """Return the velocities ``[..., C]`` predicted by hidden states ``[..., D]``."""
        weight, bias = self.velocity["weight"], self.velocity["bias"]
        return F.linear(hidden.to(weight.dtype), weight, bias)

    def fuse(self, visual: Tensor, latents: Tensor) -> Tensor:
        """Return the base's visual tokens u ``[T, D]``, changed by the latents g ``[T, C]`` of the same places.

        This is the channel-wise concatenation (u; g), followed by a linear layer (I + dW; W_g).
        """
        parameters = self.fusion
        u = visual.to(parameters["latents"].dtype)
        if "visual_down" in parameters:
            change = F.linear(F.linear(u, parameters["visual_down"]), parameters["visual_up"])
        else:
            change = F.linear(u, parameters["visual"])
        change = change + F.linear(latents.to(u.dtype), parameters["latents"])
        return visual + change.to(visual.dtype)


def shared_layers(config: UnifiedConfig, layers: int) -> int:
    """Return how many of a decoder's first layers share queries and keys with the base."""
    return layers // 2 if config.shared_layers is None else config.shared_layers


def sinusoid(values: Tensor, channels: int) -> Tensor:
    """Return ``[..., channels]``: cosines, then sines, at wavelengths from 2π to 2π·10,000 (arXiv 1706.03762, 3.5)."""
    half = channels // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=values.device) / half).to(values.dtype)
    angles = values[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


def _sinusoid_2d(grid: Tensor, channels: int) -> Tensor:
    """Return ``[..., channels]``: the sinusoid of the row, then that of the column.

    If the number of channels is not divisible by four, the last ones are zero.
    """
    quarter = channels // 4 * 2
    rows, columns = (sinusoid(grid[..., axis].float(), quarter) for axis in (0, 1))
    return F.pad(torch.cat([rows, columns], -1), (0, channels - 2 * quarter))


def _linear(into: int, out: int, settings: dict[str, Any]) -> nn.ParameterDict:
    linear = nn.Linear(into, out, **settings)
    return nn.ParameterDict({"weight": linear.weight, "bias": linear.bias})


def _fusion(config: UnifiedConfig, width: int, channels: int, settings: dict[str, Any]) -> dict[str, nn.Parameter]:
    parameters = {"latents": nn.Parameter(torch.zeros(width, channels, **settings))}
    if config.decoupling == "full":
        return parameters | {"visual": nn.Parameter(torch.zeros(width, width, **settings))}
    rank = min(config.decoupling, width)
    down = torch.randn(rank, width, **settings) / width**0.5
    return parameters | {
        "visual_down": nn.Parameter(down),
        "visual_up": nn.Parameter(torch.zeros(width, rank, **settings)),
    }
