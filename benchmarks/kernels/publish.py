"""From the folder of a GPU quarter hour to results, pictures, docs, and what ``kernel="auto"`` goes by.

    python -m benchmarks.kernels.publish gpu-results

FOLDER's measurements become ``benchmarks/results/<card>-<date>.json`` with a picture an operation, the table in
``docs/speed.md``, and ``emma_adapter/kernels/measured.json``. Commit them whatever they say.
"""

from __future__ import annotations

import re
from pathlib import Path

import click

from emma_adapter.kernels.measured import MEASURED_FILE

from .bare_checkout import ROOT
from .measured import record_measured, told
from .plot import draw
from .records import Record, Results, groups
from .table import readme_table

#: What each stage leaves. Where one case is in several, the last counts: with ``torch.compile`` beside the others.
FILES = ("table.json", "bench.json", "bench-compile.json")
BEGIN, END = "<!-- measured on a GPU: written by benchmarks.kernels.publish -->", "<!-- end of what was measured -->"


def merged(folder: Path) -> Results:
    """All groups that were measured, in the order of the largest file."""
    found = [Results.load(folder / name) for name in FILES if (folder / name).exists()]
    if not found:
        raise click.ClickException(
            f"{folder} has none of {', '.join(FILES)}: no stage that measures has finished a case"
        )
    chosen: dict[tuple[object, ...], list[Record]] = {}
    for results in found:
        for group in groups(results.records):
            key = (*group[0].group, group[0].dtype)
            if sum(record.median_us is not None for record in group) >= sum(
                record.median_us is not None for record in chosen.get(key, [])
            ):
                chosen[key] = group
    return Results(found[-1].machine, [record for group in chosen.values() for record in group])


def publish(folder: Path, results_folder: Path, docs: Path, measured: Path) -> list[str]:
    """Lines that say what was written and decided."""
    results = merged(folder)
    machine = results.machine
    stem = re.sub(r"[^a-z0-9]+", "-", machine.device.lower()).strip("-") + f"-{machine.date}"
    results.save(results_folder / f"{stem}.json")
    paths = [results_folder / f"{stem}.json", *draw(results, results_folder, stem)]
    lines = ["Written: " + ", ".join(path.name for path in paths)]
    if machine.kind == "cuda":
        _write_table(docs, readme_table(results, everything=True))
        lines.append(f"Table in {docs.name}")
    lines += told(record_measured(results, measured))
    return lines


def _write_table(docs: Path, table: str) -> None:
    text = docs.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise click.ClickException(
            f"{docs.name} must have the lines {BEGIN!r} and {END!r}, between which the table goes"
        )
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    docs.write_text(f"{before}{BEGIN}\n\n{table}\n{END}{after}")


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
def main(folder: Path) -> None:
    for line in publish(folder, ROOT / "benchmarks" / "results", ROOT / "docs" / "speed.md", MEASURED_FILE):
        click.echo(line)


if __name__ == "__main__":
    main()
