"""Which runs there are, what each trains, and how one is done."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from transformers import LlavaProcessor

from ..digits_vqa import arms
from ..digits_vqa.ablation.features import CachedData, use_cached_features, with_placeholders
from ..digits_vqa.ablation.plan import RATES, SEEDS, TUNING_SEED, Base, Cell, Job, Towers
from ..digits_vqa.ablation.recipes import BASE, joint, lora, shuffled
from ..digits_vqa.ablation.records import Record
from ..digits_vqa.ablation.settings import Settings
from ..digits_vqa.ablation.sweep import Sweep
from ..digits_vqa.ablation.worker import train_and_test
from ..digits_vqa.arms import Arm, Builder
from ..digits_vqa.pooled_llava import POOLINGS, PooledLlava
from . import bases, features
from .data import make_data
from .settings import PhotoSettings
from .vlm import TOKENS_SIDE, processor

FUSION = "modulation"
#: Beside the base model.
ARMS = (lora(), lora(2), FUSION, joint(FUSION), shuffled(FUSION))
POOLINGS_MEASURED = ("1", "4")

#: A: parameters of the adapter on this base model; LoRA gets the rank that comes nearest to a multiple of it.
ADAPTER_SIZE = 75_696
#: A width at which the adapter isn't larger than the projector and the language model's layers; of 4, 8 and 16 heads
#: the ones that were best on the validation photographs, in one run each.
_INNER_DIM, _NUM_HEADS = 64, 8

#: Seconds on one slow core: a picture of the vision tower; a step of a base model and of a run, and by what share each
#: token of an image slows it; what surrounds either; and by what an adapter, and both at once, slow a run.
_PICTURE, _AROUND = 0.063, 6.0
_BASE_STEP, _BASE_STEP_PER_IMAGE_TOKEN, _STEP, _STEP_PER_IMAGE_TOKEN = 0.139, 0.012, 0.029, 0.02
_SLOWER = {FUSION: 1.15, shuffled(FUSION): 1.15, joint(FUSION): 1.5}


def plan() -> list[Job]:
    """All jobs, the most valuable first."""
    jobs: list[Job] = [Towers(0), Base(0, bases.WHOLE), Cell(BASE, bases.WHOLE, 0, 0, "test", 0.0)]
    for pooling in POOLINGS_MEASURED:
        jobs += _of_pooling(pooling)
    return jobs


def _of_pooling(pooling: str) -> Iterator[Job]:
    yield Base(0, pooling)
    yield Cell(BASE, pooling, 0, 0, "test", 0.0)
    for arm in ARMS:
        for rate in RATES:
            yield Cell(arm, pooling, 0, TUNING_SEED, "validation", rate)
    for seed in SEEDS:
        for arm in ARMS:
            yield Cell(arm, pooling, 0, seed, "test", None)


def builders() -> dict[str, Builder]:
    """All arms, by the name they have in records and tables."""
    # The family doesn't know this vision tower's grid.
    adapter = arms.emma(
        FUSION, "llm", inner_dim=_INNER_DIM, num_heads=_NUM_HEADS, visual_grid=(TOKENS_SIDE, TOKENS_SIDE)
    )
    return {
        BASE: arms.base,
        lora(): _lora(1),
        lora(2): _lora(2),
        FUSION: arms.instructed(adapter),
        joint(FUSION): arms.instructed(arms.together(adapter, _lora(1))),
        shuffled(FUSION): arms.shuffled(adapter),
    }


def _lora(multiple: int) -> Builder:
    def build(model: PooledLlava, processor: LlavaProcessor) -> Arm:
        return arms.lora(arms.lora_of_size(model, multiple * ADAPTER_SIZE))(model, processor)

    return build


class PhotoSweep(Sweep):
    """The sweep of this study: ``Towers(0)`` is what the pretrained vision tower makes of all pictures."""

    @staticmethod
    def execute(job: Job, settings: PhotoSettings, work: Path) -> Record | None:  # type: ignore[override]
        if isinstance(job, Towers):
            features.make(settings, work)
            return None
        if isinstance(job, Base):
            bases.make(job, settings, work)
            return None
        return _run(job, settings, work)

    @staticmethod
    def needs(job: Job, settings: Settings) -> Job | None:
        if isinstance(job, Cell):
            return Base(job.base, job.pooling)
        if isinstance(job, Base):
            return Towers(job.base) if job.pooling == bases.WHOLE else Base(job.base, bases.WHOLE)
        return None

    @staticmethod
    def is_made(job: Towers | Base, settings: PhotoSettings, work: Path) -> bool:  # type: ignore[override]
        if isinstance(job, Towers):
            return features.are_made(settings, work)
        return bases.folder(job, settings, work).exists()

    @staticmethod
    def seconds(job: Job, settings: PhotoSettings) -> float:  # type: ignore[override]
        """What a job takes on one slow core; a base model, at most."""
        if isinstance(job, Towers):
            return _PICTURE * (settings.train_scenes + 4 * settings.test_scenes)
        further = POOLINGS[job.pooling].tokens - 1
        if isinstance(job, Base):
            step = _BASE_STEP * (1 + _BASE_STEP_PER_IMAGE_TOKEN * further)
            return _AROUND + step * (settings.base_steps + settings.decay_steps)
        steps = 0 if job.arm == BASE else settings.steps
        step = _STEP * (1 + _STEP_PER_IMAGE_TOKEN * further) * (settings.batch_size / 32)
        return _AROUND + steps * step * _SLOWER.get(job.arm, 1)


def _run(cell: Cell, settings: PhotoSettings, work: Path) -> Record:
    assert cell.rate is not None
    folder = bases.folder(Base(cell.base, cell.pooling), settings, work)
    torch.manual_seed(cell.seed)
    cached = _cached(cell.split, settings, work)
    data = with_placeholders(cached.data, cell.pooling)
    arm = builders()[cell.arm](use_cached_features(arms.load_base(folder), cached), processor())
    arm.learning_rate = cell.rate
    return train_and_test(cell, arm, data, processor(), settings)


@cache
def _cached(split: str, settings: PhotoSettings, work: Path) -> CachedData:
    hidden_states = torch.cat([features.read(settings, work, part) for part in ("train", split)])
    return CachedData(make_data(processor(), settings, split), hidden_states)
