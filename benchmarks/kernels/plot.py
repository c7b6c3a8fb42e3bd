"""A picture an operation, from the results: time of each variant relative to the baseline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from .records import Record, Results, groups
from .shapes import PHASES

# One colour a variant, whatever the operation; the kernels stand out.
_COLOURS = {
    "authors": "#9a9a9a",
    "authors, as shipped": "#cfcfcf",
    "eager": "#4c78a8",
    "manual": "#9ecae9",
    "compile": "#54a24b",
    "flex": "#b79a20",
    "varlen": "#b279a2",
    "triton": "#e4572e",
}
_ROW = 0.14  # inches a bar


def draw(results: Results, folder: Path, stem: str) -> list[Path]:
    """One file an operation that was measured, ``<stem>-<operation>.png``."""
    paths = []
    known = [record for record in results.records if record.variant in _COLOURS]
    for operation in dict.fromkeys(record.operation for record in known):
        records = [record for record in known if record.operation == operation]
        path = folder / f"{stem}-{operation}.png"
        _draw_operation(operation, records, results, path)
        paths.append(path)
    return paths


def _draw_operation(operation: str, records: Sequence[Record], results: Results, path: Path) -> None:
    """A row of axes a pass, a column a batch size; in each a group of bars a shape."""
    batches = sorted({record.batch for record in records})
    shapes = list(dict.fromkeys(record.shape for record in records))
    variants = [name for name in _COLOURS if any(record.variant == name for record in records)]
    found = {group[0].group: group for group in groups(records)}
    size = (2.4 + 3 * len(batches), 1.5 + len(PHASES) * (0.4 + len(shapes) * (len(variants) + 1) * _ROW))
    figure, axes = plt.subplots(
        len(PHASES), len(batches), figsize=size, squeeze=False, layout="constrained", sharex="row", sharey=True
    )
    for row, phase in enumerate(PHASES):
        for column, batch in enumerate(batches):
            axis = axes[row][column]
            for place, shape in enumerate(shapes):
                _draw_group(axis, place, found.get((operation, phase, shape, batch), []), variants)
            axis.axvline(1, color="black", linewidth=0.8)
            axis.set_title(f"{phase}, B={batch}", fontsize=9)
            axis.tick_params(labelsize=8, labelleft=column == 0)
            axis.spines[["top", "right"]].set_visible(False)
        axis.set_yticks(range(len(shapes)), [shape.replace(", ", ",\n") for shape in shapes])
        axis.set_ylim(len(shapes) - 0.5, -0.5)
        axis.set_xlim(0, 1.12 * axis.get_xlim()[1])  # room for the numbers
    baselines = ", ".join(dict.fromkeys(record.baseline for record in records))
    figure.suptitle(
        f"{operation}: time / time of “{baselines}” (shorter is faster)\n{_where(results, records[0])}", fontsize=10
    )
    handles = [mpl.patches.Patch(color=_COLOURS[name], label=name) for name in variants]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(variants), fontsize=8, frameon=False)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _where(results: Results, record: Record) -> str:
    machine = results.machine
    threads = f", {machine.threads} thread{'s' if machine.threads > 1 else ''}" if machine.kind == "cpu" else ""
    return f"{machine.device}{threads}, {record.dtype}, torch {machine.torch}, {machine.date}"


def _draw_group(axis: Any, place: int, group: Sequence[Record], variants: Sequence[str]) -> None:
    """The bars of one shape, around ``place``; in it those of the variants that apply, one below another."""
    thickness = 0.8 / len(variants)
    here = sorted(group, key=lambda record: variants.index(record.variant))
    for i, record in enumerate(here):
        y = place + (i - (len(here) - 1) / 2) * thickness
        if record.ratio is None:
            axis.text(0.02, y, f"{record.variant}: not measured", va="center", fontsize=6, color="#888888")
            continue
        axis.barh(y, record.ratio, height=0.9 * thickness, color=_COLOURS[record.variant])
        axis.text(record.ratio, y, f" {record.ratio:.2f}", va="center", fontsize=6)


@click.command(help=__doc__)
@click.argument("file", type=click.Path(exists=True, path_type=Path))
def main(file: Path) -> None:
    for path in draw(Results.load(file), file.parent, file.stem):
        click.echo(path)


if __name__ == "__main__":
    main()
