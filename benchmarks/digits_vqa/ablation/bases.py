"""The base checkpoints: the shipped one, and those that the sweep makes in its work folder."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from transformers import CLIPTextModel

from .. import arms, pretrain
from ..vlm import BASE_DIR, text_tower_config, word_tokenizer
from .plan import Base, Settings


def folder(base: Base, settings: Settings, work: Path) -> Path:
    """Where a base checkpoint is, or will be; the first one ships with the repository."""
    if base == Base(0, 1):
        return BASE_DIR
    steps = f"{settings.contrastive_steps}-{settings.language_steps}"
    if base.pooled_tokens > 1:
        steps += f"-{settings.pooled_steps}"
    return work / f"base-{base.base}-pooled-to-{base.pooled_tokens}-steps-{steps}"


def is_made(base: Base, settings: Settings, work: Path) -> bool:
    return folder(base, settings, work).exists()


def make(base: Base, settings: Settings, work: Path) -> None:
    """Pre-train with another seed; or, to pool to more tokens, go on from the checkpoint that pools to one, with the
    same vision and text tower."""
    target = folder(base, settings, work)
    if target.exists():
        return
    work.mkdir(parents=True, exist_ok=True)
    if base.pooled_tokens == 1:
        clip = pretrain.train_towers(settings.contrastive_steps, base.base)
        text_tower = clip.text_model
        model = pretrain.train_language(clip.vision_model.state_dict(), settings.language_steps, seed=base.base)
    else:
        single = folder(Base(base.base, 1), settings, work)
        start = arms.load_base(single)
        text_tower = CLIPTextModel.from_pretrained(single / "text_tower", dtype=torch.float32)
        model = pretrain.train_language(
            start.model.vision_tower.state_dict(),
            settings.pooled_steps,
            seed=base.base,
            pooled_tokens=base.pooled_tokens,
            start=start.state_dict(),
        )
    # There at once, and whole.
    unfinished = Path(tempfile.mkdtemp(dir=work))
    pretrain.save_base(model, text_tower, unfinished)
    unfinished.rename(target)


def untrained_text_tower(seed: int, work: Path) -> Path:
    """A text tower as the trained one, with random weights."""
    target = work / f"untrained-text-tower-{seed}"
    if not target.exists():
        work.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=work))
        with torch.random.fork_rng():
            torch.manual_seed(1000 + seed)
            CLIPTextModel(text_tower_config()).save_pretrained(unfinished)
        word_tokenizer(for_text_tower=True).save_pretrained(unfinished)
        try:
            unfinished.rename(target)
        except OSError:
            # Another worker was first.
            shutil.rmtree(unfinished)
    return target
