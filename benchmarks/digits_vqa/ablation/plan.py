"""Which runs there are, in the order of their worth."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Literal, NamedTuple

from . import recipes
from .recipes import BASE, LORA_QV, PROJECTOR, PROJECTOR_LORA
from .settings import Settings, ShortBases

Split = Literal["validation", "test"]

#: Of every arm alike, tried on the validation split.
RATES = (8e-4, 2e-3, 5e-3, 1.25e-2)
SEEDS = (0, 1, 2)
#: Of the runs that choose a rate: none of those that are reported.
TUNING_SEED = 100
BASES = (0, 1, 2)


class Towers(NamedTuple):
    """The vision and the text tower of a base checkpoint, whatever it pools to."""

    base: int


class Base(NamedTuple):
    """A base checkpoint to make; ``pooling`` is a name in ``pooled_llava.POOLINGS``."""

    base: int
    pooling: str


class Cell(NamedTuple):
    """A run. ``rate`` is None where it is the one that was best on the validation split."""

    arm: str
    pooling: str
    base: int
    seed: int
    split: Split
    rate: float | None

    @property
    def tunes(self) -> bool:
        return self.split == "validation"


Job = Towers | Base | Cell


def practice_plan(fusion: str) -> list[Job]:
    """What practice does: the adapter and LoRA together, beside LoRA of the same total size; then the controls and
    other ways to instruct at one token an image, and other ways to pool. ``fusion`` is the adapter's."""
    main = recipes.practice(fusion)
    jobs: list[Job] = []
    for pooling in ("1", "4", "16", "2"):
        jobs += _stage(main, pooling, with_base=True)
    others = [recipes.shuffled(fusion), recipes.constant(fusion), PROJECTOR, PROJECTOR_LORA]
    others += [recipes.with_projector(fusion), *(other for other in reversed(recipes.FUSIONS) if other != fusion)]
    llm = recipes.llm_embeddings(fusion)
    roles = [recipes.with_roles(fusion), llm, recipes.with_roles(llm)]
    jobs += _stage([*others, *roles, recipes.random_tower(fusion), recipes.TWO_STEPS], "1")
    # Where the adapter gains less than with one token, and still more than with four.
    jobs += _stage(roles, "2")
    for pooling in ("4, pixel shuffle", "1, averaged before projecting"):
        jobs += _stage(main, pooling, with_base=True)
    for pooling in ("1", "4"):
        jobs += _stage([recipes.behind_projector(fusion), recipes.MODA], pooling)
    return list(dict.fromkeys(jobs))


def parts_plan(fusion: str) -> list[Job]:
    """The parts of each fusion; ``fusion`` is the one that has shuffled instructions and meets other poolings."""
    lora = recipes.lora()
    main = [PROJECTOR, LORA_QV, lora, PROJECTOR_LORA, fusion]
    main += [other for other in recipes.FUSIONS if other != fusion]
    main += [recipes.shuffled(fusion), recipes.constant(fusion), recipes.random_tower(fusion)]
    with_projector = [recipes.with_projector(other) for other in recipes.FUSIONS]
    parts = [*recipes.LINEAR_PARTS, *recipes.ATTENTION_CHANGES]
    jobs = [*_stage(main, "1", with_base=True), *_stage(with_projector, "1"), *_stage(parts, "1")]
    jobs += _stage([recipes.llm_embeddings(fusion)], "1")
    for pooling in ("4", "16", "2"):
        # Each adapter beside LoRA of its own size; without the projector where 1 and 4 tokens tell what to expect.
        arms = [lora, fusion]
        if pooling != "2":
            arms += [PROJECTOR_LORA, recipes.with_projector(fusion)]
        jobs += _stage(arms, pooling, with_base=True)
    return list(dict.fromkeys(jobs))


def _stage(arms: list[str], pooling: str, *, with_base: bool = False) -> Iterator[Job]:
    """Rates of all arms; then all arms of one base and seed after the other."""
    if with_base:
        yield from (Towers(0), Base(0, pooling))
    for arm in arms:
        for rate in RATES:
            yield Cell(arm, pooling, 0, TUNING_SEED, "validation", rate)
    if with_base:
        for base in BASES[1:]:
            yield from (Towers(base), Base(base, pooling))
        # Nothing is trained: no rate, and one seed.
        yield from (Cell(BASE, pooling, base, 0, "test", 0.0) for base in BASES)
    for seed in SEEDS:
        for base in BASES:
            for arm in arms:
                yield Cell(arm, pooling, base, seed, "test", None)


def needs(job: Job, settings: Settings) -> Job | None:
    """What has to be made before, and itself may need something."""
    if isinstance(job, Cell):
        return Base(job.base, job.pooling)
    if isinstance(job, Base):
        goes_on = isinstance(settings, ShortBases) and job.pooling != "1"
        return Base(job.base, "1") if goes_on else Towers(job.base)
    return None


def only_arms(jobs: Iterable[Job], arms: Collection[str], settings: Settings) -> list[Job]:
    """The runs of these arms, and what they need.

    Raises:
        ValueError: naming an arm that isn't in the plan.
    """
    jobs = list(jobs)
    known = {job.arm for job in jobs if isinstance(job, Cell)}
    for arm in arms:
        if arm not in known:
            raise ValueError(f"there is no arm {arm!r} in this plan; there are: {'; '.join(sorted(known))}")
    return with_needs(jobs, {job for job in jobs if isinstance(job, Cell) and job.arm in arms}, settings)


def with_needs(
    jobs: Iterable[Job],
    cells: Collection[Cell],
    settings: Settings,
    needs: Callable[[Job, Settings], Job | None] = needs,
) -> list[Job]:
    """Those of the jobs that are these runs, or are needed for them."""
    found: set[Job] = set()
    wanted: set[Job] = set(cells)
    while wanted:
        found |= wanted
        wanted = {needed for job in wanted if (needed := needs(job, settings)) is not None} - found
    return [job for job in jobs if job in found]
