"""What the frozen vision tower makes of all pictures, once, in the work folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from . import stamps
from .data import pictures
from .efficientnet import PIXEL_MEAN, PIXEL_STD, EfficientNetLite, download_weights, pretrained
from .scenes import Scenes, render
from .settings import PhotoSettings
from .stamps import SPLITS, Stamp

_BATCH = 32


def path(settings: PhotoSettings, work: Path, split: str) -> Path:
    number = settings.train_scenes if split == "train" else settings.test_scenes
    return work / f"features-{split}-{number}.pt"


def are_made(settings: PhotoSettings, work: Path) -> bool:
    return all(path(settings, work, split).exists() for split in SPLITS)


def make(settings: PhotoSettings, work: Path) -> None:
    """Download photographs and weights, and encode what isn't encoded yet."""
    photographs, tower = stamps.read(stamps.download(work)), pretrained(download_weights(work))
    for split in SPLITS:
        target = path(settings, work, split)
        if not target.exists():
            encoded = encode(tower, pictures(settings, split), photographs, split)
            scratch = target.with_suffix(".unfinished")
            torch.save(encoded.half(), scratch)
            scratch.rename(target)


def read(settings: PhotoSettings, work: Path, split: str) -> Tensor:
    """``[pictures, N, D]``, float32."""
    return torch.load(path(settings, work, split)).float()


@torch.no_grad()
def encode(tower: EfficientNetLite, scenes: Sequence[Scenes], photographs: Sequence[Stamp], split: str) -> Tensor:
    """``[pictures, N, D]`` of the scenes with the photographs of the split."""
    draw = partial(render, stamps=photographs, split=split)
    batches = [batch for some in scenes for batch in _batches(some)]
    encoded = [
        tower(pixel_values=to_pixel_values(draw(batch))).last_hidden_state
        for batch in tqdm(batches, desc=f"{split} pictures", mininterval=5)
    ]
    return torch.cat(encoded)


def to_pixel_values(drawn: np.ndarray) -> Tensor:
    """What the processor makes of uint8 pictures ``[n, H, W, 3]``: ``[n, 3, H, W]``, float32."""
    return (torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 255 - PIXEL_MEAN) / PIXEL_STD


def _batches(scenes: Scenes) -> Iterator[Scenes]:
    for start in range(0, len(scenes), _BATCH):
        some = slice(start, start + _BATCH)
        yield Scenes(**{field.name: getattr(scenes, field.name)[some] for field in fields(scenes)})
