"""A Qwen3-VL with random weights that draws, at any width, and prompts of any length for it."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from emma_adapter import EmmaUnified, UnifiedConfig, unify_model

from ..digits_unified import vlm

CHANNELS, COMPRESSION = 32, 32


@dataclass(frozen=True)
class Size:
    """Of the language model."""

    layers: int
    width: int
    intermediate: int
    heads: int
    kv_heads: int

    @property
    def head_dim(self) -> int:
        return 128 if self.width >= 1024 else 64


#: "4b" is the shape of Qwen3-4B, which the paper starts from and Qwen3-VL-4B has.
SIZES = {
    "small": Size(layers=4, width=1024, intermediate=3072, heads=8, kv_heads=4),
    "4b": Size(layers=36, width=2560, intermediate=9728, heads=32, kv_heads=8),
}


class MeanColours(nn.Module):
    """An autoencoder by the protocol alone, because its time is not what is measured."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(latent_channels=CHANNELS, scaling_factor=None)
        self.spatial_compression_ratio = COMPRESSION

    def encode(self, x: Tensor) -> SimpleNamespace:
        colours = F.avg_pool2d(x, COMPRESSION)
        return SimpleNamespace(latent=colours.repeat(1, CHANNELS // 3 + 1, 1, 1)[:, :CHANNELS])

    def decode(self, z: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=F.interpolate(z[:, :3], scale_factor=COMPRESSION))


def make(size: Size, decoupling: Any, device: torch.device, dtype: torch.dtype) -> EmmaUnified:
    """Return a model that draws; its branch is at the start of training."""
    settings = vlm.config().to_dict()
    settings["text_config"] |= {
        "num_hidden_layers": size.layers,
        "hidden_size": size.width,
        "intermediate_size": size.intermediate,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.head_dim,
        "max_position_embeddings": 8192,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [size.head_dim // 2 - 2 * (size.head_dim // 6), size.head_dim // 6, size.head_dim // 6],
        },
    }
    settings["vision_config"] |= {"out_hidden_size": size.width}
    torch.manual_seed(0)
    with device:
        model: Any = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**settings)).eval()
    model = model.to(dtype)
    config = UnifiedConfig(decoupling=decoupling)
    unified = unify_model(model, config, processor=vlm.processor(), autoencoder=MeanColours().to(device))
    for parameter in unified.parameters():
        parameter.requires_grad_(False)
    return unified.set_progress_bar_config(disable=True)


def prompt_of(tokens: int) -> str:
    """Return a prompt of about so many tokens, one a word."""
    return " ".join(["red five at the top left ,"] * (tokens // 7 + 1))
