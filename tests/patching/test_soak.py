"""The soak: a minute of it, and that it fails where memory, the cache or answers aren't as they should be."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.soak import load
from benchmarks.soak.figures import (
    ALLOWED_BYTES,
    ALLOWED_OBJECTS,
    ALLOWED_RESIDENT_BYTES,
    ALLOWED_TENSORS,
    Sample,
    problems,
)
from benchmarks.soak.run import Soak
from emma_adapter.instructions import cache, encoders

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.nightly
def test_a_minute_of_it(tmp_path):
    """What the documentation says to run for half an hour."""
    command = [sys.executable, "-m", "benchmarks.soak", "--minutes", "1", "--output", str(tmp_path / "samples")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "memory flat, cache bounded, no drift" in done.stdout
    samples = [json.loads(line) for line in (tmp_path / "samples").read_text().splitlines()]
    assert samples[-1]["calls"] > 50
    assert {sample["threads"] for sample in samples} == {6}


FLAT = [
    Sample(
        seconds=10.0 * i,
        calls=100 * i,
        resident=10**9 + 10**6 * (i % 3),
        in_use=3 * 10**8 + 10**5 * (i % 5),
        objects=10**5 + 50 * (i % 4),
        tensors=500 + 10 * (i % 2),
        threads=6,
        descriptors=6,
        cached=16,
        cache_misses=20 * i,
        cache_size=16,
    )
    for i in range(1, 31)
]


def changed(change):
    return [dataclasses.replace(sample, **change(number, sample)) for number, sample in enumerate(FLAT)]


def test_figures_that_go_up_and_down_are_flat():
    assert problems(FLAT) == []
    # A process that warms up, and one that is lent memory for a moment.
    assert problems(changed(lambda n, sample: {"tensors": sample.tensors - 400 * (n < 8)})) == []
    assert problems(changed(lambda n, sample: {"resident": sample.resident + 10**9 * (n in (12, 29))})) == []


@pytest.mark.parametrize(
    ("said", "change"),
    [
        ("more tensors", lambda n, sample: {"tensors": sample.tensors + ALLOWED_TENSORS * n // 10}),
        ("more objects", lambda n, sample: {"objects": sample.objects + ALLOWED_OBJECTS * n // 10}),
        ("more bytes in use", lambda n, sample: {"in_use": sample.in_use + ALLOWED_BYTES * n // 10}),
        ("more bytes of memory", lambda n, sample: {"resident": sample.resident + ALLOWED_RESIDENT_BYTES * n // 10}),
        ("more threads", lambda n, sample: {"threads": 6 + n // 10}),
        ("more open files", lambda n, sample: {"descriptors": 6 + n // 5}),
        ("cache held 17", lambda n, sample: {"cached": 17 if n == 5 else 16}),
        ("fill the cache", lambda n, sample: {"cache_misses": 16}),
        ("have changed: adapter, 1", lambda n, sample: {"drifted": ("adapter, 1",) if n == 20 else ()}),
        ("standstill", lambda n, sample: {"calls": min(sample.calls, 1000)}),
    ],
)
def test_figures_that_fail(said, change):
    [problem] = problems(changed(change))
    assert said in problem


def test_a_run_that_is_too_short_proves_nothing():
    assert "longer" in problems(FLAT[:5])[0]
    assert "longer" in problems([])[0]


def soaked():
    """The verdict of the shortest run there is, and what calls raised."""
    soak = Soak(threads=2, seed=0)
    samples = list(soak.samples(0, 0))
    return " ".join(problems(samples)), soak.failures


class EndlessCache(cache.LRUCache):
    """One that says it is bounded."""

    def __init__(self, maxsize):
        super().__init__(10**9)
        self.said = maxsize

    def info(self):
        return super().info()._replace(maxsize=self.said)


@pytest.mark.slow
@pytest.mark.nightly
def test_a_cache_without_bound_is_noticed(monkeypatch):
    monkeypatch.setattr(encoders, "LRUCache", EndlessCache)
    found, failures = soaked()
    assert "the cache held" in found
    assert "more tensors" in found
    assert not failures


@pytest.mark.slow
@pytest.mark.nightly
def test_a_leak_drift_and_failures_are_noticed(monkeypatch):
    kept = []

    def meddling(served, dice):
        load.forward(served, dice)
        kept.extend(torch.zeros(10) for _ in range(10))
        with torch.no_grad():
            next(iter(served.adapter.parameters())).add_(1e-3)
        raise KeyError("unexpected")

    monkeypatch.setattr("benchmarks.soak.run.CALLS", [meddling])
    found, failures = soaked()
    assert "more tensors" in found
    assert "have changed: adapter, 0" in found
    assert "original" not in found
    assert "unexpected" in failures[0]
