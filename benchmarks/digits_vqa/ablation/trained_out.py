"""A base model that is trained until it stops getting better: at a constant rate while the loss on validation scenes
falls, then from the best point on with a rate that falls to nothing. Interrupted, it goes on where it stopped."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...digits_unified.training import Optimizer, train
from .. import language, pretrain
from ..pooled_llava import PooledLlava
from ..scenes import sample_scenes

RATE, WARM_UP = 3e-3, 80
EVALUATE_EVERY = 250
#: Stop after so many evaluations in a row that aren't better than the best before by this share. What is compared is
#: the mean of the last few: at a constant rate one evaluation was seen to be 14 % worse than the one before.
PATIENCE, IMPROVEMENT, SMOOTHED = 3, 0.01, 4
VALIDATION_SCENES = 500

_VALIDATION_SEED = 12


def train_out(
    vision_tower: Mapping[str, Tensor],
    *,
    pooling: str,
    language_layers: int,
    seed: int,
    budget: int,
    decay_steps: int,
    work: Path,
) -> tuple[PooledLlava, dict[str, Any]]:
    """The model, and how it was trained; ``work`` holds what an interrupted call has done, and belongs to it alone."""
    torch.manual_seed(seed)
    model = pretrain.untrained(vision_tower, pooling, language_layers)
    scenes = sample_scenes(language.SCENES, "train", np.random.default_rng(2 + 1000 * seed))
    tokens = language.visual_tokens(model, scenes)
    unseen = sample_scenes(VALIDATION_SCENES, "validation", np.random.default_rng(_VALIDATION_SEED))
    unseen_tokens = language.visual_tokens(model, unseen)

    def loss(step: int, rng: np.random.Generator) -> Tensor:
        return language.loss(model, tokens, scenes, rng.integers(0, len(scenes), language.BATCH), rng)

    @torch.no_grad()
    def validation_loss() -> float:
        rng = np.random.default_rng(_VALIDATION_SEED)
        return language.loss(model, unseen_tokens, unseen, np.arange(len(unseen)), rng).item()

    training = train_until_no_better(
        model, loss, validation_loss, seed=seed, budget=budget, decay_steps=decay_steps, work=work
    )
    return model, {
        "pooling": pooling,
        "language_layers": language_layers,
        "seed": seed,
        **training,
        "validation_accuracy": language.answer_accuracy(model, "validation"),
    }


def train_until_no_better(
    model: PooledLlava,
    loss: Callable[[int, np.random.Generator], Tensor],
    validation_loss: Callable[[], float],
    *,
    seed: int,
    budget: int,
    decay_steps: int,
    work: Path,
) -> dict[str, Any]:
    """Train what of the model isn't frozen, and return how. ``loss(step, rng)`` is what the optimizer gets; ``work`` as
    of :func:`train_out`."""
    work.mkdir(parents=True, exist_ok=True)
    saved, best, curve = work / "constant.pt", work / "best.pt", work / "curve.json"
    losses: list[float] = json.loads(curve.read_text()) if curve.exists() else []
    constant = _optimizer(model, math.inf, WARM_UP)
    while not is_trained_out(losses, budget):
        train(saved.stem, constant, loss, seed=seed, until=_steps(len(losses) + 1, budget), work=work)
        losses.append(validation_loss())
        if losses[-1] == min(losses):
            shutil.copy(saved, best)
        # Last: an evaluation that isn't written down is done again, and its copy too.
        scratch = curve.with_suffix(".unfinished")
        scratch.write_text(json.dumps(losses))
        os.replace(scratch, curve)

    decay = _optimizer(model, decay_steps, 1)
    decay.restore(torch.load(best))
    # Other draws than in the first steps.
    train("decay", decay, loss, seed=seed + 500, work=work)
    model.eval()
    return {
        "steps_at_constant_rate": _steps(len(losses), budget),
        "best_step": _steps(1 + int(np.argmin(losses)), budget),
        "decay_steps": decay_steps,
        "stopped": "no improvement" if evaluations_in_vain(losses) >= PATIENCE else "budget",
        "validation_losses": {str(_steps(1 + i, budget)): round(value, 5) for i, value in enumerate(losses)},
        "validation_loss": round(validation_loss(), 5),
    }


def is_trained_out(losses: Sequence[float], budget: int) -> bool:
    return evaluations_in_vain(losses) >= PATIENCE or _steps(len(losses), budget) >= budget


def evaluations_in_vain(losses: Sequence[float]) -> int:
    """How many of the last ones weren't better by ``IMPROVEMENT`` than the best before."""
    reference, in_vain = math.inf, 0
    for number in range(1, len(losses) + 1):
        smoothed = float(np.mean(losses[max(0, number - SMOOTHED) : number]))
        if smoothed <= (1 - IMPROVEMENT) * reference:
            reference, in_vain = smoothed, 0
        else:
            in_vain += 1
    return in_vain


def _steps(evaluations: int, budget: int) -> int:
    """Those done at that evaluation."""
    return min(budget, evaluations * EVALUATE_EVERY)


def _optimizer(model: PooledLlava, steps: float, warm_up: int) -> Optimizer:
    embedding: Any = model.get_input_embeddings().weight
    return Optimizer(model.parameters(), RATE, steps, edges=[embedding], warm_up=warm_up, weight_decay=0.02)
