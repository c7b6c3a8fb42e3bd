"""What was found, as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from itertools import groupby
from pathlib import Path
from typing import Any

from .machine import Machine


@dataclass(frozen=True)
class Record:
    """One variant in one setting. What was not measured is None; ``error`` says why if it failed."""

    operation: str
    phase: str
    shape: str
    num_tokens: int
    dim: int
    batch: int
    dtype: str
    train_vision: bool
    variant: str
    baseline: str
    compiled: bool = False
    error: str | None = None
    median_us: float | None = None
    percentile_20_us: float | None = None
    percentile_80_us: float | None = None
    ratio: float | None = None
    bandwidth_percent: float | None = None
    tower_percent: float | None = None
    peak_bytes: int | None = None
    saved_bytes: int | None = None
    launches: int | None = None
    difference: float | None = None

    @property
    def group(self) -> tuple[str, str, str, int]:
        """What variants are compared in."""
        return self.operation, self.phase, self.shape, self.batch


@dataclass
class Results:
    machine: Machine
    records: list[Record] = field(default_factory=list)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A line a record, without what was not measured.
        lines = ",\n".join(
            json.dumps({name: value for name, value in asdict(record).items() if value is not None})
            for record in self.records
        )
        path.write_text(f'{{"machine": {json.dumps(asdict(self.machine))},\n"records": [\n{lines}\n]}}\n')

    @classmethod
    def load(cls, path: Path) -> Results:
        stored = json.loads(path.read_text())
        return cls(_of(Machine, stored["machine"]), [_of(Record, record) for record in stored["records"]])


def groups(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Records of one operation, pass, shape and batch, in the order of measurement."""
    for _, group in groupby(records, key=lambda record: record.group):
        yield list(group)


def _of(cls: Any, values: dict[str, Any]) -> Any:
    known = {entry.name for entry in fields(cls)}
    return cls(**{name: value for name, value in values.items() if name in known})
