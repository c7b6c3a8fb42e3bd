"""The ablation on real handwritten digits, resumable: ``python -m benchmarks.digits_vqa.ablation``.

Trains every arm of the plan on cached features, tests it on unseen handwriting, and appends one JSON line a finished
run. Interrupted, the same command goes on where it stopped. At the end it writes table and figure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import click
from filelock import FileLock, Timeout

from . import recipes
from .duration import describe
from .plan import only_arms
from .report import study_option, write_report
from .settings import TrainedOutBases
from .studies import STUDIES
from .sweep import Sweep

_DEFAULTS = {field.name: field.default for field in fields(TrainedOutBases)}


Command = TypeVar("Command", bound=Callable[..., Any])


def _setting(name: str, help: str) -> Callable[[Command], Command]:
    option, help = f"--{name.replace('_', '-')}", f"{help}  [default: {_DEFAULTS[name]}]"
    return click.option(option, type=click.IntRange(min=1), help=help)


@click.command(help=__doc__)
@study_option
@click.option("--plan", "only_plan", is_flag=True, help="Print how many runs are left and how long they take; no more.")
@click.option("--workers", type=click.IntRange(min=1), default=2, show_default=True, help="Processes of one thread.")
@click.option(
    "--fusion",
    type=click.Choice(recipes.FUSIONS),
    default="modulation",
    show_default=True,
    help="Of the adapter that is trained with LoRA, and has shuffled, constant and random instructions.",
)
@click.option("--only", multiple=True, help="Only arms of this name, and what they need. Repeatable.")
@click.option("--results", type=click.Path(path_type=Path, dir_okay=False), help="Default: the study's.")
@click.option(
    "--work",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("ablation-work"),
    show_default=True,
    help="Folder of the base checkpoints that are made on the way, and of logs.",
)
@_setting("steps", "Training steps of each run.")
@_setting("batch_size", "Questions a step.")
@_setting("train_scenes", "Scenes to train on, four questions each.")
@_setting("test_scenes", "Scenes to test on, up to seven questions each; and pairs.")
@_setting("contrastive_steps", "Of a base checkpoint's towers.")
@_setting("base_steps", "Most steps of a base checkpoint at a constant rate.")
@_setting("decay_steps", "Of a base checkpoint, after those.")
@_setting("language_layers", "Layers of a base checkpoint's language model.")
def main(
    study_name: str,
    only_plan: bool,
    workers: int,
    fusion: str,
    only: tuple[str, ...],
    results: Path | None,
    work: Path,
    **settings: int | None,
) -> None:
    study = STUDIES[study_name]
    given = {name: value for name, value in settings.items() if value is not None}
    if foreign := sorted(set(given) - {field.name for field in fields(study.settings)}):
        raise click.BadParameter(f"the study {study_name!r} has no such setting", param_hint=", ".join(foreign))
    chosen, results = replace(study.settings, **given), results or study.results
    jobs = study.plan(fusion)
    if only:
        try:
            jobs = only_arms(jobs, only, chosen)
        except ValueError as error:
            raise click.BadParameter(str(error), param_hint="--only") from None
    if only_plan:
        click.echo(describe(Sweep(jobs, chosen, results, work).pending, chosen, workers))
        return
    work.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(work / "sweep.lock", timeout=0):
            sweep = Sweep(jobs, chosen, results, work)
            click.echo(describe(sweep.pending, chosen, workers))
            sweep.run_in_processes(workers)
    except Timeout:
        raise click.ClickException(
            f"another sweep is running in {work}; wait for it, or choose another --work and --results"
        ) from None
    write_report(study, results, chosen, fusion)


if __name__ == "__main__":
    main()
