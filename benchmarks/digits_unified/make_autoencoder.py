"""Make the shipped autoencoder again from scratch: ``python -m benchmarks.digits_unified.make_autoencoder``.

A diffusers ``AutoencoderDC`` that compresses 32 times, with 32 channels. It is trained on both sizes of scenes, because
convolutions see a picture's border, and on varied handwriting; then the decoder alone. About fifteen minutes.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from diffusers import AutoencoderDC
from torch import Tensor

from ..digits_vqa.scenes import SPLITS
from .judge import load_judge, mean, score_drawings
from .scenes import GRIDS, Hand, render, sample_scenes
from .training import Optimizer, train

AUTOENCODER_DIR = Path(__file__).parent / "autoencoder"
LATENTS_FILE = "latents.json"

#: At a rate that hardly falls (it would reach zero after ``HORIZON``); then down to zero; then the decoder alone.
STEPS, HORIZON = 1200, 3500
ANNEALING_STEPS = 900
DECODER_STEPS = 600
#: Pictures of a step, by grid: about as many pixels either way.
BATCH = {2: 20, 3: 9}

# No layers in the first stage: picture and first features are at half resolution, which costs a quarter.
CONFIG = {
    "in_channels": 3,
    "latent_channels": 32,
    "encoder_block_types": "ResBlock",
    "decoder_block_types": "ResBlock",
    "encoder_block_out_channels": (16, 16, 32, 64, 128, 128),
    "decoder_block_out_channels": (16, 16, 32, 64, 128, 128),
    "encoder_layers_per_block": (0, 1, 1, 1, 1, 1),
    "decoder_layers_per_block": (0, 1, 1, 2, 2, 1),
    "encoder_qkv_multiscales": ((),) * 6,
    "decoder_qkv_multiscales": ((),) * 6,
}


def loss(model: Any, step: int, rng: np.random.Generator) -> Tensor:
    """Squares first: with absolute errors alone, the best that a decoder can do at first is to draw the ground."""
    grid = GRIDS[step % len(GRIDS)]
    hand: Hand = "varied" if rng.random() < 0.7 else "natural"
    scenes = sample_scenes(BATCH[grid], "train", rng, grid=grid, hand=hand)
    pictures = (render(scenes) * 2 - 1).contiguous(memory_format=torch.channels_last)
    error = model(pictures).sample - pictures
    across, down = error.diff(dim=-1).abs().mean(), error.diff(dim=-2).abs().mean()
    return 4 * error.square().mean() + 0.5 * error.abs().mean() + 0.3 * (across + down)


@torch.no_grad()
def encode(model: Any, pictures: Tensor) -> Tensor:
    """Latents ``[n, 32, H / 32, W / 32]`` of pictures in [0, 1]."""
    return torch.cat([model.encode(part * 2 - 1).latent for part in pictures.split(64)])


@torch.no_grad()
def decode(model: Any, latents: Tensor) -> Tensor:
    """Pictures in [0, 1]."""
    return torch.cat([model.decode(part).sample for part in latents.split(64)]).add(1).div(2).clamp(0, 1)


def reconstruct(pictures: Tensor) -> Tensor:
    """Pictures through the shipped autoencoder."""
    model = load_autoencoder()
    return decode(model, encode(model, pictures))


def measure_latents(model: Any, scenes: int = 1000) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, over training scenes of both sizes."""
    rng = np.random.default_rng(17)
    latents = [encode(model, render(sample_scenes(scenes, "train", rng, grid=grid))) for grid in GRIDS]
    flat = torch.cat([part.movedim(1, -1).flatten(0, -2) for part in latents])
    return flat.mean(0), flat.std(0)


def load_autoencoder(folder: Path = AUTOENCODER_DIR) -> Any:
    return AutoencoderDC.from_pretrained(folder, torch_dtype=torch.float32).eval().requires_grad_(False)


def report(model: Any, n: int = 400) -> None:
    """What the judge reads of originals and of reconstructions: no drawn picture can be read better."""
    judge = load_judge()
    for split in SPLITS:
        for grid in GRIDS:
            scenes = sample_scenes(n, split, np.random.default_rng(3), grid=grid)
            pictures = render(scenes)
            again = decode(model, encode(model, pictures))
            psnr = -10 * (again - pictures).square().mean((1, 2, 3)).log10().mean().item()
            read = {
                name: mean(score_drawings(judge.read(seen), scenes))
                for name, seen in (("original", pictures), ("reconstruction", again))
            }
            figures = ", ".join(
                f"{name}: digit {one['digit']:.3f}, colour {one['colour']:.3f}, scene {one['whole scene']:.3f}"
                for name, one in read.items()
            )
            print(f"{split}, grid {grid}: PSNR {psnr:.1f} dB; {figures}", flush=True)


@click.command(help=__doc__)
@click.option("--output", type=click.Path(path_type=Path), default=AUTOENCODER_DIR, show_default=True)
def main(output: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(3)
    model: Any = AutoencoderDC(**CONFIG)
    model.train()

    def go(name: str, optimizer: Optimizer, *, seed: int, until: int | None = None) -> None:
        train(name, optimizer, lambda step, rng: loss(model, step, rng), seed=seed, until=until)

    go("autoencoder", Optimizer(model.parameters(), 2e-3, HORIZON), seed=31, until=STEPS)
    go("autoencoder, annealed", Optimizer(model.parameters(), 1.5e-3, ANNEALING_STEPS), seed=33)
    # The decoder can go on without touching what branches are trained on, which are latents.
    model.encoder.requires_grad_(False)
    save(model, output)
    go("decoder", Optimizer(model.decoder.parameters(), 1e-3, DECODER_STEPS), seed=32)
    save(model, output)
    report(load_autoencoder(output))


def save(model: Any, output: Path) -> None:
    """In half precision, which halves the shipped file; the latents are measured with what it holds."""
    copy.deepcopy(model).half().save_pretrained(output)
    average, deviation = measure_latents(load_autoencoder(output))
    (output / LATENTS_FILE).write_text(json.dumps({"mean": average.tolist(), "std": deviation.tolist()}) + "\n")


if __name__ == "__main__":
    main()
