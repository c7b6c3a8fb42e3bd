"""How long the jobs of a plan take."""

from __future__ import annotations

from collections.abc import Iterable

from ..pooled_llava import POOLINGS
from .plan import Base, Cell, Job, Towers
from .recipes import BASE, FUSIONS, MULTIPLES, joint
from .settings import Settings, ShortBases, TrainedOutBases

#: Seconds on one slow core: a step of a run, and what surrounds it; what slows a step: each token of an image, each
#: layer of the language model beyond two, and two kinds of parameters to train.
_STEP, _AROUND, _PER_IMAGE_TOKEN, _PER_LAYER, _JOINT = 0.028, 6.0, 0.042, 0.25, 1.45
#: Of a base checkpoint: a step of the towers, a step for each layer of the language model and what a token of the image
#: adds to that, and what surrounds it.
_CONTRASTIVE_STEP, _LAYER_STEP, _LAYER_STEP_PER_IMAGE_TOKEN, _AROUND_BASE = 0.43, 0.059, 0.0012, 40.0

_JOINT_ARMS = {joint(fusion, multiple) for fusion in FUSIONS for multiple in MULTIPLES}


def seconds(job: Job, settings: Settings) -> float:
    """What a job takes on one slow core; a base checkpoint that is trained out, at most."""
    if isinstance(job, Towers):
        return 0.0 if job.base == 0 else settings.contrastive_steps * _CONTRASTIVE_STEP
    tokens = POOLINGS[job.pooling].tokens
    if isinstance(job, Base):
        return _AROUND_BASE + _base_steps(job, settings) * _layers(settings) * (
            _LAYER_STEP + _LAYER_STEP_PER_IMAGE_TOKEN * tokens
        )
    if job.arm == BASE:
        return _AROUND
    step = _STEP * (settings.batch_size / 32) * (1 + _PER_IMAGE_TOKEN * (tokens - 1))
    step *= 1 + _PER_LAYER * (_layers(settings) - 2)
    return _AROUND + settings.steps * step * (_JOINT if job.arm in _JOINT_ARMS else 1)


def _base_steps(base: Base, settings: Settings) -> int:
    if isinstance(settings, TrainedOutBases):
        return settings.base_steps + settings.decay_steps
    assert isinstance(settings, ShortBases)
    if base.pooling != "1":
        return settings.pooled_steps
    return 0 if base.base == 0 else settings.language_steps


def _layers(settings: Settings) -> int:
    return settings.language_layers if isinstance(settings, TrainedOutBases) else 2


def describe(jobs: Iterable[Job], settings: Settings, workers: int) -> str:
    """How many runs of each kind, and how long they take."""
    jobs = list(jobs)
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        if isinstance(job, Towers):
            kind = "pairs of towers"
        elif isinstance(job, Base):
            kind = f"base checkpoints, pooled to {job.pooling}"
        else:
            kind = f"{job.split} runs, pooled to {job.pooling}"
        groups.setdefault(kind, []).append(job)
    lines, total = [], 0.0
    for kind, members in groups.items():
        took = sum(seconds(job, settings) for job in members)
        total += took
        arms = len({job.arm for job in members if isinstance(job, Cell)})
        of_arms = f", {arms} arms" if arms else ""
        lines.append(f"{len(members):4d} {kind}{of_arms}: {took / 60:.0f} core minutes")
    runs = sum(isinstance(job, Cell) for job in jobs)
    bases = sum(isinstance(job, Base) for job in jobs)
    at_most = ", if every base checkpoint takes all its steps" if isinstance(settings, TrainedOutBases) else ""
    lines.append(
        f"{runs:4d} runs and {bases} base checkpoints in all: {total / 3600:.1f} core hours, about "
        f"{total / 3600 / workers:.1f} hours with {workers} worker(s){at_most}"
    )
    return "\n".join(lines)
