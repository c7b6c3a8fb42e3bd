"""Finished runs, one JSON line each, and what they say together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np


def load_records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def add_record(path: Path, record: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def interval(values: np.ndarray, draws: int = 2000) -> tuple[float, float, float]:
    """Mean and 95 % interval of ``[seeds, n]``, by a bootstrap over seeds and, apart from them, over scenes."""
    rng = np.random.default_rng(0)
    seeds, n = values.shape
    means = [np.nanmean(values[rng.integers(0, seeds, seeds)][:, rng.integers(0, n, n)]) for _ in range(draws)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(np.nanmean(values)), float(low), float(high)


def mean_and_interval(values: np.ndarray) -> str:
    """Mean and interval as a table has them."""
    average, low, high = interval(values)
    return f"{average:.3f} ({low:.3f} to {high:.3f})"
