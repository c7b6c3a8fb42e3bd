"""A tiny autoencoder of the real class, and unified models of the zoo."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from PIL import Image
from torch import nn

import tiny
from emma_adapter import EmmaUnified, UnifiedConfig, unify_model
from tiny import train_randomly
from zoo import ZOO


@cache
def _autoencoder(channels: int, stages: int) -> nn.Module:
    from diffusers import AutoencoderDC

    widths = (8, 8, 16, 16, 32, 32)[-stages:]
    kind = tuple("ResBlock" for _ in widths)
    none = tuple(() for _ in widths)
    layers = (0, *(1 for _ in widths[1:]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        made = AutoencoderDC(
            latent_channels=channels,
            attention_head_dim=8,
            encoder_block_types=kind,
            decoder_block_types=kind,
            encoder_block_out_channels=widths,
            decoder_block_out_channels=widths,
            encoder_layers_per_block=layers,
            decoder_layers_per_block=layers,
            encoder_qkv_multiscales=none,
            decoder_qkv_multiscales=none,
            downsample_block_type="Conv",
            upsample_block_type="interpolate",
            scaling_factor=0.5,
        )
    return made.eval()


def autoencoder(channels: int = 8, compression: int = 32) -> nn.Module:
    """diffusers' ``AutoencoderDC``, untrained."""
    return _autoencoder(channels, compression.bit_length())


def picture(seed: int, width: int = 56, height: int = 56) -> Image.Image:
    return tiny.picture(seed).resize((width, height))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(adapter: EmmaUnified, prompt: Any = "a red five", image: Any = None, **settings: Any) -> Any:
    """Latents, of two steps unless the settings say otherwise."""
    made = {"height": 64, "width": 96, "num_inference_steps": 2, "output_type": "latent", **settings}
    return adapter.generate_images(prompt, image, **made).images


def unified(
    name: str = "qwen3_vl", config: UnifiedConfig | None = None, *, trained: bool = True, model: Any = None
) -> EmmaUnified:
    """A model of the zoo that draws; with ``trained``, no weight of the branch is zero."""
    entry = ZOO[name]
    model = entry.model() if model is None else model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = unify_model(model, config, processor=entry.processor(), autoencoder=autoencoder())
    if trained:
        train_randomly(model.emma_unified, 0.05)
    return made.set_progress_bar_config(disable=True)
