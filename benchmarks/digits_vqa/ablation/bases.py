"""The base checkpoints that a study trains on, and their towers, in the work folder; the first towers are shipped."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTextModel

from .. import arms, pretrain
from ..pooled_llava import PooledLlava
from ..vlm import BASE_DIR, text_tower_config, word_tokenizer
from .plan import Base, Towers
from .settings import Settings, ShortBases, TrainedOutBases
from .trained_out import train_out

#: In the folder of a base checkpoint that was trained out: how long, and how well it does.
TRAINING = "training.json"


def folder(made: Towers | Base, settings: Settings, work: Path) -> Path:
    """Where a base checkpoint, or one with towers alone, is or will be."""
    steps = f"{settings.contrastive_steps}"
    if isinstance(made, Towers):
        return BASE_DIR if made.base == 0 else work / f"towers-{made.base}-steps-{steps}"
    name = f"base-{made.base}-pooled-to-{made.pooling.replace(',', '').replace(' ', '-')}"
    if isinstance(settings, TrainedOutBases):
        steps += f"-{settings.base_steps}-{settings.decay_steps}"
        return work / f"{name}-trained-out-layers-{settings.language_layers}-steps-{steps}"
    assert isinstance(settings, ShortBases)
    if made == Base(0, "1"):
        return BASE_DIR
    steps += f"-{settings.language_steps}" + (f"-{settings.pooled_steps}" if made.pooling != "1" else "")
    return work / f"{name}-steps-{steps}"


def is_made(made: Towers | Base, settings: Settings, work: Path) -> bool:
    return folder(made, settings, work).exists()


def make(wanted: Towers | Base, settings: Settings, work: Path) -> None:
    """Train it, if it isn't there; what it needs is."""
    target = folder(wanted, settings, work)
    if target.exists():
        return
    work.mkdir(parents=True, exist_ok=True)
    training = None
    if isinstance(wanted, Towers):
        clip = pretrain.train_towers(settings.contrastive_steps, wanted.base)
        model, text_tower = pretrain.untrained(clip.vision_model.state_dict()), clip.text_model
    else:
        towers = folder(Towers(wanted.base), settings, work)
        text_tower = CLIPTextModel.from_pretrained(towers / "text_tower", dtype=torch.float32)
        unfinished = target.with_name(f"{target.name}.unfinished")
        if isinstance(settings, TrainedOutBases):
            model, training = _trained_out(wanted, settings, towers, unfinished)
        else:
            assert isinstance(settings, ShortBases)
            model = _short(wanted, settings, towers, work)
    with _whole(target) as scratch:
        pretrain.save_base(model, text_tower, scratch)
        if training is not None:
            (scratch / TRAINING).write_text(json.dumps(training, indent=1) + "\n")
    if training is not None:
        shutil.rmtree(unfinished)


def _trained_out(
    wanted: Base, settings: TrainedOutBases, towers: Path, work: Path
) -> tuple[PooledLlava, dict[str, Any]]:
    return train_out(
        arms.load_base(towers).model.vision_tower.state_dict(),
        pooling=wanted.pooling,
        language_layers=settings.language_layers,
        seed=wanted.base,
        budget=settings.base_steps,
        decay_steps=settings.decay_steps,
        work=work,
    )


def _short(wanted: Base, settings: ShortBases, towers: Path, work: Path) -> PooledLlava:
    vision_tower = arms.load_base(towers).model.vision_tower.state_dict()
    if wanted.pooling == "1":
        return pretrain.train_language(vision_tower, settings.language_steps, seed=wanted.base)
    start = arms.load_base(folder(Base(wanted.base, "1"), settings, work)).state_dict()
    return pretrain.train_language(
        vision_tower, settings.pooled_steps, seed=wanted.base, pooling=wanted.pooling, start=start
    )


def untrained_text_tower(seed: int, work: Path) -> Path:
    """A text tower as the trained one, with random weights."""
    target = work / f"untrained-text-tower-{seed}"
    if not target.exists():
        work.mkdir(parents=True, exist_ok=True)
        with _whole(target) as scratch, torch.random.fork_rng():
            torch.manual_seed(1000 + seed)
            CLIPTextModel(text_tower_config()).save_pretrained(scratch)
            word_tokenizer(for_text_tower=True).save_pretrained(scratch)
    return target


@contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """A folder to fill, which is then there at once, and whole."""
    scratch = Path(tempfile.mkdtemp(dir=target.parent))
    yield scratch
    try:
        scratch.rename(target)
    except OSError:
        # Another worker was first.
        shutil.rmtree(scratch)
