"""One job, in a process of one thread."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from dataclasses import asdict
from functools import cache
from pathlib import Path

import numpy as np
import torch
from transformers import AutoProcessor, LlavaProcessor

from .. import arms
from ..questions import Question
from ..runs import Data, QuestionSet, answer, make_data, train
from ..vlm import BASE_DIR
from . import bases, recipes
from .features import CachedData, cache_features, use_cached_features, with_placeholders
from .plan import Base, Cell, Job, Towers
from .records import Record, at_edge, pack
from .settings import Settings


def start_process(log: Path) -> None:
    """What a worker process begins with: the console is the sweep's, and it is the one that is interrupted."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A pool's processes outlive a parent that is killed, and would wait for jobs forever.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.stdout = sys.stderr = log.with_name(f"{log.stem}-{os.getpid()}.log").open("w", buffering=1)
    torch.set_num_threads(1)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def execute(job: Job, settings: Settings, work: Path) -> Record | None:
    """Make a checkpoint, or train and test an arm whose rate is known."""
    if isinstance(job, Cell):
        return _run(job, settings, work)
    bases.make(job, settings, work)
    return None


def _run(cell: Cell, settings: Settings, work: Path) -> Record:
    assert cell.rate is not None
    folder = bases.folder(Base(cell.base, cell.pooling), settings, work)
    untrained = bases.untrained_text_tower(cell.seed, work)
    cached = _cached(cell.base, cell.split, settings, work)
    data = with_placeholders(cached.data, cell.pooling)
    processor = _processor(folder)
    torch.manual_seed(cell.seed)
    model = use_cached_features(arms.load_base(folder), cached)
    arm = recipes.builders(folder / "text_tower", untrained)[cell.arm](model, processor)
    arm.learning_rate = cell.rate
    return train_and_test(cell, arm, data, processor, settings)


def train_and_test(cell: Cell, arm: arms.Arm, data: Data, processor: LlavaProcessor, settings: Settings) -> Record:
    """Train an arm, whose rate is set, and test it."""
    assert cell.rate is not None
    started, cpu = time.perf_counter(), time.process_time()
    if arm.parameters:
        train(arm, data.train, processor, steps=settings.steps, batch_size=settings.batch_size, seed=cell.seed)
    took, cpu_took = time.perf_counter() - started, time.process_time() - cpu
    right = _right(arm, data.test, processor)
    # They don't choose a rate.
    pairs_right = np.zeros(0, bool) if cell.tunes else _right(arm, data.pairs, processor)
    types = np.array([question.type for question in data.test.questions])
    accuracy = {type: float(right[types == type].mean()) for type in dict.fromkeys(types.tolist())}
    return Record(
        **{**cell._asdict(), "rate": cell.rate},
        rate_at_edge=None if cell.tunes or not arm.parameters else at_edge(cell.rate),
        settings=asdict(settings),
        parameters=arm.num_parameters,
        seconds=round(took, 1),
        cpu_seconds=round(cpu_took, 1),
        mean=round(float(np.mean(list(accuracy.values()))), 5),
        accuracy={type: round(share, 5) for type, share in accuracy.items()},
        pairs=None if cell.tunes else round(float(pairs_right.reshape(-1, 2).all(1).mean()), 5),
        right=pack(right),
        pairs_right=pack(pairs_right),
        questions=fingerprint(data.test.questions + data.pairs.questions),
    )


def _right(arm: arms.Arm, asked: QuestionSet, processor: LlavaProcessor) -> np.ndarray:
    given = answer(arm, asked, processor)
    return np.array([word == question.answer for word, question in zip(given, asked.questions, strict=True)])


def fingerprint(questions: list[Question]) -> str:
    return hashlib.sha256(repr(questions).encode()).hexdigest()[:16]


@cache
def _processor(folder: Path) -> LlavaProcessor:
    return AutoProcessor.from_pretrained(folder)


@cache
def _data(split: str, settings: Settings) -> Data:
    scenes = settings.test_scenes
    return make_data(
        _processor(BASE_DIR), train_scenes=settings.train_scenes, test_scenes=scenes, pairs=scenes, split=split
    )


@cache
def _cached(base: int, split: str, settings: Settings, work: Path) -> CachedData:
    return cache_features(arms.load_base(bases.folder(Towers(base), settings, work)), _data(split, settings))
