"""The base models: projector and language model learn captions and questions until they stop getting better.

One token a cell comes first; the others go on from there, as a model that has seen all of an image is taught to make do
with fewer tokens. Trained from nothing, a model with one token can't use where a question points, and its embeddings of
"left" and "right" end up the same: nothing for an adapter to read.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..digits_vqa import arms, language
from ..digits_vqa.ablation.bases import TRAINING
from ..digits_vqa.ablation.plan import Base
from ..digits_vqa.ablation.trained_out import train_until_no_better
from ..digits_vqa.pooled_llava import PooledLlava
from . import features
from .data import ask_for_test, ask_for_training
from .efficientnet import download_weights, pretrained
from .questions import ask_any, caption
from .scenes import Scenes
from .settings import PhotoSettings
from .vlm import TOKEN_ID, llava_config, processor

#: One token a cell: what its base model answers is what the others could.
WHOLE = "9"

_CAPTIONS = 0.15
_VALIDATION_SEED = 12


def folder(base: Base, settings: PhotoSettings, work: Path) -> Path:
    steps = f"{settings.base_steps}-{settings.decay_steps}-scenes-{settings.train_scenes}"
    return work / f"base-{base.base}-pooled-to-{base.pooling}-steps-{steps}"


def make(base: Base, settings: PhotoSettings, work: Path) -> None:
    """Train it, if it isn't there; interrupted, the same call goes on where it stopped."""
    target = folder(base, settings, work)
    if target.exists():
        return
    torch.manual_seed(base.base)
    model = PooledLlava(llava_config(base.pooling))
    if base.pooling == WHOLE:
        model.model.vision_tower = pretrained(download_weights(work))
    else:
        model.load_state_dict(arms.load_base(folder(base._replace(pooling=WHOLE), settings, work)).state_dict())
        model.model.vision_tower.requires_grad_(False)
    scenes, _ = ask_for_training(settings.train_scenes)
    tokens = features.read(settings, work, "train")
    unseen, _ = ask_for_test(settings.test_scenes, "validation")
    unseen_tokens = features.read(settings, work, "validation")

    def loss(step: int, rng: np.random.Generator) -> Tensor:
        return _loss(model, tokens, scenes, rng.integers(0, len(scenes), language.BATCH), rng)

    @torch.no_grad()
    def validation_loss() -> float:
        rng = np.random.default_rng(_VALIDATION_SEED)
        return _loss(model, unseen_tokens, unseen, np.arange(len(unseen)), rng).item()

    unfinished = target.with_name(f"{target.name}.unfinished")
    training = train_until_no_better(
        model,
        loss,
        validation_loss,
        seed=base.base,
        budget=settings.base_steps,
        decay_steps=settings.decay_steps,
        work=unfinished,
    )
    scratch = Path(tempfile.mkdtemp(dir=work))
    model.save_pretrained(scratch)
    processor().save_pretrained(scratch)
    (scratch / TRAINING).write_text(json.dumps(training, indent=1) + "\n")
    scratch.rename(target)
    shutil.rmtree(unfinished)


def _loss(model: PooledLlava, tokens: Tensor, scenes: Scenes, chosen: np.ndarray, rng: np.random.Generator) -> Tensor:
    """Of a conversation about each of the chosen scenes; ``tokens [scenes, N, D]`` are of all."""
    talks = []
    for i in chosen:
        kinds, grounds = scenes.kinds[i], scenes.grounds[i]
        turns = [("", caption(kinds, grounds))]
        if rng.random() >= _CAPTIONS:
            turns = [ask_any(kinds, grounds, rng)[1:] for _ in range(4)]
        talks.append(language.conversation(turns, model.config.image_seq_length, TOKEN_ID))
    return language.loss_of_conversations(model, tokens[chosen], talks)
