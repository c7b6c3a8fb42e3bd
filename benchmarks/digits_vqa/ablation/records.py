"""The results file: one JSON line a finished run."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np

from .plan import RATES, Cell
from .settings import Settings


@dataclass(frozen=True)
class Record:
    arm: str
    pooling: str
    base: int
    seed: int
    split: str
    rate: float
    #: Whether the best rate was the lowest or the highest of those that were tried; None where it is being searched.
    rate_at_edge: bool | None
    settings: dict[str, int]
    parameters: int
    seconds: float  # of training
    cpu_seconds: float
    mean: float  # over question types
    accuracy: dict[str, float]
    pairs: float | None
    #: Whether each question, and each question of a pair, was answered right: packed bits in base64.
    right: str
    pairs_right: str
    #: What was asked: records of other questions can't be compared.
    questions: str

    @property
    def cell(self) -> Cell:
        return Cell(self.arm, self.pooling, self.base, self.seed, self.split, self.rate)  # type: ignore[arg-type]


def pack(right: np.ndarray) -> str:
    return base64.b64encode(np.packbits(right).tobytes()).decode()


def unpack(text: str, number: int) -> np.ndarray:
    """Bool ``[number]``."""
    return np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8), count=number).astype(bool)


def read(path: Path) -> list[Record]:
    """All finished runs; a last line that was cut off by a kill is none.

    Raises:
        click.ClickException: if another line is damaged.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    records = []
    # What follows the last line end is empty, or cut off.
    for number, line in enumerate(lines[:-1], start=1):
        try:
            records.append(Record(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise click.ClickException(
                f"line {number} of {path} is no record of this benchmark ({error}); remove the line, and its run is "
                "done again"
            ) from error
    return records


def drop_cut_off_line(path: Path) -> None:
    """Before anything is appended, which would else become a part of it."""
    if path.exists():
        whole = path.read_bytes().rfind(b"\n") + 1
        os.truncate(path, whole)


def append(path: Path, record: Record) -> None:
    """One write, on disk before it returns."""
    with path.open("ab", buffering=0) as file:
        file.write((json.dumps(asdict(record)) + "\n").encode())
        os.fsync(file.fileno())


def of_settings(records: Iterable[Record], settings: Settings) -> list[Record]:
    return [record for record in records if record.settings == asdict(settings)]


def best_rate(records: Iterable[Record], arm: str, pooling: str) -> float | None:
    """The best on the validation split; None while not all have been tried."""
    found = {
        record.rate: record.mean
        for record in records
        if (record.arm, record.pooling, record.split) == (arm, pooling, "validation")
    }
    return None if set(RATES) - set(found) else max(RATES, key=lambda rate: found[rate])


def at_edge(rate: float) -> bool:
    return rate in (min(RATES), max(RATES))
