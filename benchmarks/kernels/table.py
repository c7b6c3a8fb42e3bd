"""The results as a Markdown table: LLaVA-1.5 at the largest batch, or all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from .machine import Machine
from .records import Record, Results, groups
from .shapes import LLAVA

HEADINGS = (
    *("operation", "pass", "variant", "µs", "20-80 %", "ratio", "% of copy bandwidth", "peak MB", "saved MB"),
    *("launches", "% of vision tower"),
)
_TEXT_COLUMNS = 3


def readme_table(results: Results, *, everything: bool = False) -> str:
    """Where it was measured, then a row a variant. Failures have rows too."""
    chosen = list(groups(results.records))
    if not everything:
        shapes = {group[0].shape for group in chosen}
        shape = LLAVA.name if LLAVA.name in shapes else chosen[0][0].shape
        chosen = [group for group in chosen if group[0].shape == shape]
        batch = max(group[0].batch for group in chosen)
        chosen = [group for group in chosen if group[0].batch == batch]
    parts = [describe(results.machine)]
    places: dict[str, list[Record]] = {}
    for group in chosen:
        places.setdefault(_place(group[0]), []).extend(group)
    for place, records in places.items():
        parts += [place + ":", _table(records)]
    return "\n\n".join(parts) + "\n"


def describe(machine: Machine) -> str:
    software = [f"torch {machine.torch}"]
    software += [f"Triton {machine.triton}"] if machine.kind == "cuda" and machine.triton else []
    threads = f", {machine.threads} thread{'s' if machine.threads > 1 else ''}" if machine.kind == "cpu" else ""
    return (
        f"{machine.device}{threads}, {', '.join(software)}, {machine.date}, `{machine.command}`; "
        f"it copies {machine.copy_bytes_per_second / 1e9:.0f} GB/s, read and written."
    )


def cells(record: Record) -> list[str]:
    """As :data:`HEADINGS`, from "variant" on."""
    if record.median_us is None:
        return [record.variant, f"failed: {record.error}", *["-"] * (len(HEADINGS) - _TEXT_COLUMNS - 1)]
    return [
        record.variant,
        _number(record.median_us, "{:,.0f}"),
        f"{_number(record.percentile_20_us, '{:,.0f}')}-{_number(record.percentile_80_us, '{:,.0f}')}",
        _number(record.ratio, "{:.2f}"),
        _number(record.bandwidth_percent, "{:.0f}"),
        _megabytes(record.peak_bytes),
        _megabytes(record.saved_bytes),
        _number(record.launches, "{:d}"),
        _number(record.tower_percent, "{:.1f}"),
    ]


def _place(record: Record) -> str:
    images = "packed" if record.batch == 1 and "packed" in record.shape else f"B={record.batch}"
    vision = ", with a gradient for the visual tokens" if record.train_vision else ""
    return f"{record.shape}, {images}, N={record.num_tokens:,}, D={record.dim:,}, {record.dtype}{vision}"


def _table(records: Sequence[Record]) -> str:
    rows = [[record.operation, record.phase, *cells(record)] for record in records]
    # Columns that say nothing, such as launches on a CPU, are left out.
    kept = [i for i in range(len(HEADINGS)) if i < _TEXT_COLUMNS or any(row[i] != "-" for row in rows)]
    rule = ["---" if i < _TEXT_COLUMNS else "---:" for i in range(len(HEADINGS))]
    return "\n".join("| " + " | ".join(row[i] for i in kept) + " |" for row in (HEADINGS, rule, *rows))


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _megabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:,.1f}"


@click.command(help=__doc__)
@click.argument("file", type=click.Path(exists=True, path_type=Path))
@click.option("--all", "everything", is_flag=True, help="Every shape and batch size.")
def main(file: Path, everything: bool) -> None:
    click.echo(readme_table(Results.load(file), everything=everything), nl=False)


if __name__ == "__main__":
    main()
