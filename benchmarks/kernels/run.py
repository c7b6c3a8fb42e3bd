"""Times the fusions on this machine: all shapes on a GPU, a subset on a CPU.

Compare numbers of one run only. Each ratio is to the first variant of its operation, in the same rounds.
"""

from __future__ import annotations

import datetime
import re
import sys
from pathlib import Path

import click
import torch
from tqdm import tqdm

from .comparison import Budget, Effort, compare, failed
from .machine import Machine, describe_machine, tower_microseconds
from .measured import record_measured, told
from .operations import OPERATIONS, Operation
from .plot import draw
from .records import Record, Results
from .shapes import BATCHES, LLAVA, PHASES, SHAPES, Setting, applies
from .table import HEADINGS, cells, readme_table
from .timing import Errors, reporting

RESULTS = Path(__file__).parents[1] / "results"
_WIDTH = 20  # of a printed column
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@click.command(help=__doc__)
@click.option("--operation", "operations", type=click.Choice(list(OPERATIONS)), multiple=True, help="Default: all.")
@click.option(
    "--batch", "batches", type=click.IntRange(min=1), multiple=True, help="Default: 1 and 4; on a GPU 64 too."
)
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="Default: bfloat16 on a GPU, float32 on a CPU.")
@click.option("--train-vision", is_flag=True, help="The visual tokens need a gradient too.")
@click.option("--tower", is_flag=True, help="Time the vision tower on a CPU too; it takes minutes.")
@click.option("--seconds", type=float, help="Sampling of each group. Default: 1 on a GPU, 6 on a CPU.")
@click.option(
    "--rounds", type=click.IntRange(min=1), default=100, show_default=True, help="Samples of each variant, at most."
)
@click.option("--minutes", default=9.0, show_default=True, help="torch.compile is left out where time runs short.")
@click.option("--threads", default=1, show_default=True, help="On a CPU.")
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS, help="Default: benchmarks/results.")
@click.option("--record/--no-record", default=True, show_default=True, help='Update what kernel="auto" goes by.')
def main(
    operations: tuple[str, ...],
    batches: tuple[int, ...],
    dtype: str | None,
    train_vision: bool,
    tower: bool,
    seconds: float | None,
    rounds: int,
    minutes: float,
    threads: int,
    output: Path,
    record: bool,
) -> None:
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    if not gpu:
        torch.set_num_threads(threads)
    chosen_dtype = DTYPES[dtype or ("bfloat16" if gpu else "float32")]
    settings = [
        (name, Setting(shape, batch, chosen_dtype, device, train_vision))
        for batch in sorted(batches or (BATCHES if gpu else BATCHES[:2]), reverse=True)
        for shape in (SHAPES if gpu else (LLAVA,))
        for name in operations or OPERATIONS
        if applies(name, shape, batch)
    ]
    budget = Budget(60 * minutes, len(settings) * len(PHASES))
    date = datetime.date.today().isoformat()
    command = " ".join(["python -m benchmarks.kernels.run", *sys.argv[1:]])
    results = Results(describe_machine(device, date=date, command=command))
    if gpu or tower:
        time_tower(results.machine, settings)
    stem = re.sub(r"[^a-z0-9]+", "-", results.machine.device.lower()).strip("-") + f"-{date}"
    effort = Effort(seconds or (1 if gpu else 6), rounds)
    with tqdm(total=len(settings) * len(PHASES), unit="group") as progress:
        for name, setting in settings:
            measure(name, setting, results, budget, effort, progress)
            # A run that is killed leaves what it found.
            results.save(output / f"{stem}.json")
    finish(results, output, stem, record=record)
    click.echo(f"Took {budget.elapsed():.0f} s.")


def measure(name: str, setting: Setting, results: Results, budget: Budget, effort: Effort, progress: tqdm) -> None:
    """Both passes of one operation in one setting; what fails has a record that says so."""
    errors: Errors = {}
    operation: Operation | None = None
    with reporting(errors, "setup"):
        operation = OPERATIONS[name](setting)
    for phase in PHASES:
        progress.set_description(f"{name}, {setting.shape.name}, B={setting.batch}, {phase}")
        records: list[Record] = []
        if operation is not None:
            with reporting(errors, "setup"):
                records = compare(name, operation, setting, phase, results.machine, budget, effort)
        records = records or [failed(name, setting, phase, errors["setup"])]
        results.records += records
        tell(records, progress)
        progress.update()
    torch._dynamo.reset()


def tell(records: list[Record], progress: tqdm) -> None:
    first = records[0]
    title = f"{first.operation}, {first.shape}, B={first.batch}, {first.phase}"
    progress.write(f"\n{title}\n  {'':20}" + "".join(f"{heading:>{_WIDTH}}" for heading in HEADINGS[3:]))
    for record in records:
        variant, *numbers = cells(record)
        shown = f"  {variant:20}" + "".join(f"{number:>{_WIDTH}}" for number in numbers)
        if record.error is not None:
            shown = (
                f"  {variant:20}  failed: {record.error}" if record.median_us is None else f"{shown}  {record.error}"
            )
        progress.write(shown)


def time_tower(machine: Machine, settings: list[tuple[str, Setting]]) -> None:
    """For the share of a step; a tower that fails leaves that column empty."""
    for setting in {setting.batch: setting for _, setting in settings if setting.shape == LLAVA}.values():
        errors: Errors = {}
        with reporting(errors, "tower"):
            microseconds = tower_microseconds(setting.batch, setting.dtype, setting.device)
            machine.tower_us[str(setting.batch)] = microseconds
        for error in errors.values():
            click.echo(f"Vision tower, B={setting.batch}: {error}")


def finish(results: Results, output: Path, stem: str, *, record: bool) -> None:
    """Pictures, the table, and what ``kernel="auto"`` goes by."""
    paths = [output / f"{stem}.json", *draw(results, output, stem)]
    click.echo("\n" + readme_table(results))
    failures = [entry for entry in results.records if entry.error is not None]
    for entry in failures:
        click.echo(f"{', '.join(map(str, entry.group))}, {entry.variant}: {entry.error}")
    click.echo(f"{len(failures)} of {len(results.records)} measurements failed or were left out.")
    for line in told(record_measured(results) if record else {}):
        click.echo(f'kernel="auto" on this device, {line}')
    click.echo("Written: " + ", ".join(path.name for path in paths) + f" in {output}")


if __name__ == "__main__":
    main()
