"""Which runs there are, in the order of their worth, and what they take."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from . import recipes
from .recipes import BASE, LORA_ALL, LORA_QV, PROJECTOR, PROJECTOR_LORA

Split = Literal["validation", "test"]

#: Of every arm alike, tried on the validation split.
RATES = (8e-4, 2e-3, 5e-3, 1.25e-2)
SEEDS = (0, 1, 2)
#: Of the runs that choose a rate: none of those that are reported.
TUNING_SEED = 100
BASES = (0, 1, 2)
POOLINGS = (1, 4, 16, 2)

#: Seconds on one slow core: a step of training, what surrounds it, and by what factor the tokens of an image slow it.
_STEP, _AROUND, _PER_IMAGE_TOKEN = 0.040, 6.0, 0.04
_CONTRASTIVE_STEP, _LANGUAGE_STEP, _AROUND_BASE = 0.43, 0.21, 40.0


@dataclass(frozen=True)
class Settings:
    """What a run is, beside its place in the plan; records of other settings don't count."""

    steps: int = 700
    batch_size: int = 32
    train_scenes: int = 12_000
    test_scenes: int = 500
    contrastive_steps: int = 600
    language_steps: int = 2000
    #: Of a base model that pools to several tokens, which starts from the one that pools to one.
    pooled_steps: int = 600


class Base(NamedTuple):
    """A base checkpoint to make."""

    base: int
    pooled_tokens: int


class Cell(NamedTuple):
    """A run. ``rate`` is None where it is the one that was best on the validation split."""

    arm: str
    pooled_tokens: int
    base: int
    seed: int
    split: Split
    rate: float | None

    @property
    def tunes(self) -> bool:
        return self.split == "validation"


Job = Base | Cell


def plan(fusion: str) -> list[Job]:
    """All jobs, the most valuable first; ``fusion`` is the one whose instructions are shuffled, and that meets other
    poolings."""
    main = [PROJECTOR, LORA_QV, LORA_ALL, PROJECTOR_LORA, fusion]
    main += [other for other in recipes.FUSIONS if other != fusion]
    main += [recipes.shuffled(fusion), recipes.constant(fusion), recipes.random_tower(fusion)]
    with_projector = [recipes.with_projector(other) for other in recipes.FUSIONS]
    parts = [*recipes.LINEAR_PARTS, *recipes.ATTENTION_CHANGES]
    jobs = [*_stage(main, 1, with_base=True), *_stage(with_projector, 1), *_stage(parts, 1)]
    jobs += _stage([recipes.llm_embeddings(fusion)], 1)
    for pooled_tokens in POOLINGS[1:]:
        # Each adapter beside LoRA of its own size; without the projector where 1 and 4 tokens tell what to expect.
        arms = [LORA_ALL, fusion]
        if pooled_tokens != POOLINGS[-1]:
            arms += [PROJECTOR_LORA, recipes.with_projector(fusion)]
        jobs += _stage(arms, pooled_tokens, with_base=True)
    return jobs


def _stage(arms: list[str], pooled_tokens: int, *, with_base: bool = False) -> Iterator[Job]:
    """Rates of all arms; then all arms of one base and seed after the other."""
    if with_base:
        yield Base(0, pooled_tokens)
    for arm in arms:
        for rate in RATES:
            yield Cell(arm, pooled_tokens, 0, TUNING_SEED, "validation", rate)
    if with_base:
        yield from (Base(base, pooled_tokens) for base in BASES[1:])
        # Nothing is trained: no rate, and one seed.
        yield from (Cell(BASE, pooled_tokens, base, 0, "test", 0.0) for base in BASES)
    for seed in SEEDS:
        for base in BASES:
            for arm in arms:
                yield Cell(arm, pooled_tokens, base, seed, "test", None)


def only_arms(jobs: Iterable[Job], arms: Collection[str]) -> list[Job]:
    """The runs of these arms, and the checkpoints that they need.

    Raises:
        ValueError: naming an arm that isn't in the plan.
    """
    jobs = list(jobs)
    known = {job.arm for job in jobs if isinstance(job, Cell)}
    for arm in arms:
        if arm not in known:
            raise ValueError(f"there is no arm {arm!r} in this plan; there are: {'; '.join(sorted(known))}")
    cells = [job for job in jobs if isinstance(job, Cell) and job.arm in arms]
    needed = {Base(cell.base, tokens) for cell in cells for tokens in (1, cell.pooled_tokens)}
    return [job for job in jobs if job in (needed if isinstance(job, Base) else cells)]


def seconds(job: Job, settings: Settings) -> float:
    """What a job was seen to take on one slow core."""
    if isinstance(job, Base):
        if job.pooled_tokens > 1:
            steps = settings.pooled_steps
            return _AROUND_BASE + steps * _LANGUAGE_STEP * (1 + _PER_IMAGE_TOKEN / 3 * job.pooled_tokens)
        if job.base == 0:
            return 0.0
        return _AROUND_BASE + settings.contrastive_steps * _CONTRASTIVE_STEP + settings.language_steps * _LANGUAGE_STEP
    steps = 0 if job.arm == BASE else settings.steps
    return _AROUND + steps * _STEP * (settings.batch_size / 32) * (1 + _PER_IMAGE_TOKEN * (job.pooled_tokens - 1))


def describe(jobs: Iterable[Job], settings: Settings, workers: int) -> str:
    """How many runs of each kind, and how long they take."""
    lines, total = [], 0.0
    jobs = list(jobs)
    groups: dict[tuple[str, int], list[Job]] = {}
    for job in jobs:
        kind = "base checkpoints" if isinstance(job, Base) else f"{job.split} runs"
        groups.setdefault((kind, job.pooled_tokens), []).append(job)
    for (kind, pooled_tokens), members in groups.items():
        took = sum(seconds(job, settings) for job in members)
        total += took
        arms = len({job.arm for job in members if isinstance(job, Cell)})
        of_arms = f" of {arms} arms" if arms else ""
        lines.append(
            f"{len(members):4d} {kind}{of_arms}, {pooled_tokens} token(s) an image: {took / 60:.0f} core minutes"
        )
    runs = sum(isinstance(job, Cell) for job in jobs)
    lines.append(
        f"{runs:4d} runs and {len(jobs) - runs} base checkpoints in all: {total / 60:.0f} core minutes, "
        f"about {total / 60 / workers:.0f} minutes with {workers} worker(s)"
    )
    return "\n".join(lines)
