"""Tells ``kernel="auto"`` where the Triton kernels were at least as fast as PyTorch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import click

from emma_adapter.kernels.measured import MEASURED_FILE

from .records import Record, Results, groups
from .shapes import BATCHES, OPERATION_NAMES, PHASES, SHAPES, applies


def record_measured(results: Results, path: Path = MEASURED_FILE) -> dict[str, bool]:
    """Update the device's entry in the package, ``{device: ["attention/bfloat16/forward", ...]}``.

    Only what was measured on every shape and batch size is touched: it is entered if Triton was nowhere slower than
    the best variant that isn't compiled, and taken out otherwise. Runs on a CPU change nothing.

    Returns:
        What was decided, by ``operation/dtype/pass``.
    """
    if results.machine.kind != "cuda":
        return {}
    verdicts = {}
    for dtype in {record.dtype for record in results.records}:
        for operation in OPERATION_NAMES:
            for phase in PHASES:
                records = [
                    record
                    for record in results.records
                    if (record.operation, record.dtype, record.phase) == (operation, dtype, phase)
                    and not record.train_vision
                ]
                verdict = _nowhere_slower(operation, records)
                if verdict is not None:
                    verdicts[f"{operation}/{dtype}/{phase}"] = verdict
    if not verdicts:
        return {}
    stored = json.loads(path.read_text()) if path.exists() else {}
    cases = {case for case in stored.get(results.machine.device, []) if verdicts.get(case, True)}
    cases |= {case for case, fast in verdicts.items() if fast}
    entries = {**stored, results.machine.device: sorted(cases)}
    path.write_text(json.dumps(dict(sorted(entries.items())), indent=2) + "\n")
    return verdicts


def _nowhere_slower(operation: str, records: Sequence[Record]) -> bool | None:
    """None if a shape wasn't run."""
    wanted = {(shape.name, batch) for shape in SHAPES for batch in BATCHES if applies(operation, shape, batch)}
    found = {(group[0].shape, group[0].batch): _as_fast(group) for group in groups(records)}
    if wanted - found.keys():
        return None
    return all(found[key] for key in wanted)


def _as_fast(group: Sequence[Record]) -> bool:
    """A kernel that failed isn't fast; and without a variant to compare with, nothing is known."""
    times = {
        record.variant: record.median_us for record in group if record.median_us is not None and not record.compiled
    }
    triton = times.pop("triton", None)
    return triton is not None and bool(times) and triton <= min(times.values())


@click.command(help=__doc__)
@click.argument("file", type=click.Path(exists=True, path_type=Path))
def main(file: Path) -> None:
    verdicts = record_measured(Results.load(file))
    for case, fast in verdicts.items():
        click.echo(f"{case}: {'Triton' if fast else 'PyTorch'}")
    if not verdicts:
        click.echo("No operation was measured on every shape and batch size on a GPU: nothing changes")


if __name__ == "__main__":
    main()
