"""A soak: many threads call a patched model for half an hour, others train, patch, save, load and copy.

Memory has to stay flat, the cache bounded, and answers bit for bit what they were. Ends with exit code 1, and the
reason, if they don't.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import click
import torch
from transformers.utils import logging

from .figures import HEADINGS, Sample, cells, limit_arenas, problems
from .run import Soak

_WIDTH = 11  # of a printed column


@click.command(help=__doc__)
@click.option("--minutes", default=30.0, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=4, show_default=True, help="That call the model.")
@click.option("--interval", type=float, help="Seconds between samples. Default: a thirtieth of the time.")
@click.option("--seed", default=0, show_default=True, help="Of what is called; when is up to the machine.")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="Samples, as JSON lines.")
def main(minutes: float, threads: int, interval: float | None, seed: int, output: Path | None) -> None:
    if sys.platform != "linux":
        raise click.ClickException("the process's memory is read from /proc, which is there on Linux only")
    limit_arenas()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    soak = Soak(threads=threads, seed=seed)
    samples: list[Sample] = []
    click.echo("".join(f"{heading:>{_WIDTH}}" for heading in HEADINGS))
    for sample in soak.samples(60 * minutes, interval or 2 * minutes):
        samples.append(sample)
        click.echo("".join(f"{cell:>{_WIDTH}}" for cell in cells(sample)))
        if output is not None:
            # One by one: a run that is killed leaves what it found.
            with output.open("a") as file:
                file.write(json.dumps(asdict(sample)) + "\n")
    found = problems(samples) + [f"a call failed:\n{failure}" for failure in soak.failures]
    for problem in found:
        click.echo(f"FAILED: {problem}", err=True)
    if found:
        sys.exit(1)
    click.echo(f"{samples[-1].calls:,} calls: memory flat, cache bounded, no drift.")


if __name__ == "__main__":
    main()
