"""What a soak measures, and when it has failed."""

from __future__ import annotations

import ctypes
import gc
import os
import statistics
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from emma_adapter import EmmaAdapter

#: The first samples don't count: libraries are imported, arenas and caches fill.
_WARM_UP = 0.3
#: By how much the end may lie over the beginning of what counts. Figures go up and down with what was called last.
ALLOWED_TENSORS = 50
ALLOWED_OBJECTS = 500
#: Of a process on a fast machine: transformers 5.23 itself keeps 3 KB each time that it loads a text tower.
ALLOWED_BYTES = 16 * 2**20
#: The same with the holes that many threads leave between what they use.
ALLOWED_RESIDENT_BYTES = 64 * 2**20
_FEWEST_SAMPLES = 8


@dataclass(frozen=True)
class Sample:
    """The process between two calls: none is running, and nothing is left to be collected."""

    seconds: float
    calls: int
    #: What the operating system has given, and what of it is in use outside of Python's own small objects.
    resident: int
    in_use: int
    objects: int
    tensors: int
    threads: int
    cached: int
    cache_misses: int
    cache_size: int
    descriptors: int
    #: Probes whose answers differ from the first ones.
    drifted: tuple[str, ...] = ()


HEADINGS = ("seconds", "calls", "MB", "in use", "objects", "tensors", "threads", "files", "cached", "drifted")


def cells(sample: Sample) -> tuple[str, ...]:
    return (
        f"{sample.seconds:.0f}",
        f"{sample.calls:,}",
        f"{sample.resident / 2**20:.1f}",
        f"{sample.in_use / 2**20:.1f}",
        f"{sample.objects:,}",
        f"{sample.tensors:,}",
        str(sample.threads),
        str(sample.descriptors),
        f"{sample.cached} of {sample.cache_size}",
        ", ".join(sample.drifted) or "none",
    )


def take_sample(adapter: EmmaAdapter, *, seconds: float, calls: int, drifted: Sequence[str]) -> Sample:
    gc.collect()
    _give_back_memory()
    objects = gc.get_objects()
    info = adapter.cache_info()
    return Sample(
        seconds=seconds,
        calls=calls,
        resident=_resident_bytes(),
        in_use=_bytes_in_use(),
        objects=len(objects),
        # By type: isinstance would wake lazy proxies.
        tensors=sum(issubclass(type(thing), Tensor) for thing in objects),
        threads=threading.active_count(),
        cached=info.currsize,
        cache_misses=info.misses,
        cache_size=info.maxsize,
        descriptors=len(os.listdir("/proc/self/fd")),
        drifted=tuple(drifted),
    )


def problems(samples: Sequence[Sample]) -> list[str]:
    """Why a soak has failed; empty if it hasn't."""
    found = []
    if len(samples) < _FEWEST_SAMPLES:
        return [f"only {len(samples)} samples, of which nothing can be told: run it for longer"]
    steady = samples[int(_WARM_UP * len(samples)) :]
    for name, values, allowed in (
        ("tensors", [sample.tensors for sample in steady], ALLOWED_TENSORS),
        ("objects", [sample.objects for sample in steady], ALLOWED_OBJECTS),
        ("bytes in use", [sample.in_use for sample in steady], ALLOWED_BYTES),
        ("bytes of memory", [sample.resident for sample in steady], ALLOWED_RESIDENT_BYTES),
        ("threads", [sample.threads for sample in steady], 0),
        ("open files", [sample.descriptors for sample in steady], 2),
    ):
        if (growth := _growth(values)) > allowed:
            found.append(f"{growth:,.0f} more {name} at the end than at the beginning; allowed are {allowed:,}")
    if over := [sample for sample in samples if sample.cached > sample.cache_size]:
        found.append(f"the cache held {over[0].cached} instructions and should hold {over[0].cache_size} at most")
    if samples[-1].cache_misses <= 2 * samples[-1].cache_size:
        found.append("too few instructions to fill the cache twice: run it for longer")
    if names := sorted({name for sample in samples for name in sample.drifted}):
        found.append(f"answers that were to stay as they are have changed: {', '.join(names)}")
    if samples[-1].calls <= samples[len(samples) // 2].calls:
        found.append("the calls came to a standstill")
    return found


def _growth(values: Sequence[float]) -> float:
    """From the first third to the last one, by their medians: a single sample tells nothing."""
    third = max(1, len(values) // 3)
    return statistics.median(values[-third:]) - statistics.median(values[:third])


def limit_arenas() -> None:
    """Have glibc use few pools of memory: with one for each thread, what a process holds depends on which thread
    happened to free what."""
    if hasattr(_LIBC, "mallopt"):
        _LIBC.mallopt(-8, 2)  # M_ARENA_MAX


class _MallInfo(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    )


_LIBC: Any = None if sys.platform == "win32" else ctypes.CDLL(None)
if hasattr(_LIBC, "mallinfo2"):
    _LIBC.mallinfo2.restype = _MallInfo


def _bytes_in_use() -> int:
    """0 where the C library doesn't tell: glibc does from 2.33 on."""
    if not hasattr(_LIBC, "mallinfo2"):
        return 0
    info = _LIBC.mallinfo2()
    return int(info.uordblks + info.hblkhd)


def _give_back_memory() -> None:
    if hasattr(_LIBC, "malloc_trim"):
        _LIBC.malloc_trim(0)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
