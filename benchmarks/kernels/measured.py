"""Tells ``kernel="auto"`` where the Triton kernels were as fast as PyTorch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import click

from emma_adapter.kernels.measured import MEASURED_FILE, Measurements

from .records import Record, Results, groups

#: How much slower than the best variant that isn't compiled still counts as as fast: about what a run repeats to.
TOLERANCE = 0.05

Verdicts = dict[str, dict[str, int] | None]


def record_measured(results: Results, path: Path = MEASURED_FILE) -> Verdicts:
    """Update the device's entry in the package, ``{device: {"attention/bfloat16/forward": {"min_tokens": 2304}}}``.

    Only operations, dtypes and passes that were measured are touched. Runs on a CPU change nothing.

    Returns:
        What was decided, by ``operation/dtype/pass``: from how many visual tokens on, or None for nowhere.
    """
    if results.machine.kind != "cuda":
        return {}
    found: dict[str, list[Record]] = {}
    for record in results.records:
        if not record.train_vision:
            found.setdefault(f"{record.operation}/{record.dtype}/{record.phase}", []).append(record)
    verdicts = {case: _verdict(records) for case, records in found.items() if _sizes(records)}
    if not verdicts:
        return {}
    stored: Measurements = json.loads(path.read_text()) if path.exists() else {}
    cases = {**stored.get(results.machine.device, {}), **verdicts}
    entries = {**stored, results.machine.device: dict(sorted(cases.items()))}
    path.write_text(json.dumps(dict(sorted(entries.items())), indent=2) + "\n")
    return verdicts


def _verdict(records: Sequence[Record]) -> dict[str, int] | None:
    """The smallest size from which on Triton was nowhere slower; None if it was at the largest."""
    least = None
    for tokens, fast in sorted(_sizes(records).items(), reverse=True):
        if not fast:
            break
        least = tokens
    return None if least is None else {"min_tokens": least}


def _sizes(records: Sequence[Record]) -> dict[int, bool]:
    """Whether Triton was as fast, by the number of visual tokens in a call: for all shapes that have as many."""
    sizes: dict[int, bool] = {}
    for group in groups(records):
        fast = _as_fast(group)
        if fast is not None:
            tokens = group[0].num_tokens * group[0].batch
            sizes[tokens] = fast and sizes.get(tokens, True)
    return sizes


def _as_fast(group: Sequence[Record]) -> bool | None:
    """A kernel that failed isn't fast; and without a variant to compare with, nothing is known."""
    times = {
        record.variant: record.median_us for record in group if record.median_us is not None and not record.compiled
    }
    triton = times.pop("triton", None)
    if not times or all(record.variant != "triton" for record in group):
        return None
    return triton is not None and triton <= (1 + TOLERANCE) * min(times.values())


def told(verdicts: Verdicts) -> list[str]:
    """A line a case."""
    return [
        f"{case}: " + (f"Triton from {least['min_tokens']:,} visual tokens on" if least else "PyTorch")
        for case, least in verdicts.items()
    ]


@click.command(help=__doc__)
@click.argument("file", type=click.Path(exists=True, path_type=Path))
def main(file: Path) -> None:
    verdicts = record_measured(Results.load(file))
    for line in told(verdicts):
        click.echo(line)
    if not verdicts:
        click.echo("Nothing was measured on a GPU beside PyTorch: nothing changes")


if __name__ == "__main__":
    main()
