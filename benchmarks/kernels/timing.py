"""Time of several calls, side by side."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

Calls = Mapping[str, Callable[[], object]]
Errors = dict[str, str]

# More than any last-level cache of a GPU.
_FLUSH_BYTES = 256 << 20


@dataclass(frozen=True)
class Timing:
    """Microseconds. ``ratio``: to the baseline in the same round, the median over rounds; None without baseline."""

    median: float
    percentile_20: float
    percentile_80: float
    ratio: float | None


@contextmanager
def reporting(errors: Errors, name: str) -> Iterator[None]:
    """What fails is recorded and doesn't end the run."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 (whatever a compiler, a driver or an allocator may raise)
        lines = str(error).strip().splitlines()
        errors[name] = type(error).__name__ + (f": {lines[0][:200]}" if lines else "")
    if name in errors and torch.cuda.is_available():
        # Where memory ran out there may be some now. A GPU beyond use refuses, which the next call reports.
        with suppress(RuntimeError):
            torch.cuda.empty_cache()


def time_calls(
    calls: Calls, baseline: str, device: torch.device, errors: Errors, *, seconds: float, rounds: int
) -> dict[str, Timing]:
    """Every round makes every call once, so that what else the machine does hits all of them; in another order, so that
    no call always meets the caches and the allocator as the same other one left them.

    Args:
        calls: by name; each has been made before, and is compiled.
        baseline: to whose time ratios are.
        device: where the calls run.
        errors: gets the calls that fail, which have no timing then.
        seconds: after which no round begins, if there were five.
        rounds: at most.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    remaining = dict(calls)
    orders = random.Random(0)
    started = time.perf_counter()
    # The first round is for warming up.
    for number in range(rounds + 1):
        for name, microseconds in _one_round(remaining, device, errors).items():
            if number:
                samples[name].append(microseconds)
        remaining = {name: call for name, call in remaining.items() if name not in errors}
        remaining = dict(orders.sample(list(remaining.items()), len(remaining)))
        if number >= 5 and time.perf_counter() - started > seconds:
            break
    reference = torch.tensor(samples[baseline]) if baseline in remaining else None
    return {name: _timing(torch.tensor(samples[name]), reference) for name in calls if name in remaining}


def _one_round(calls: Calls, device: torch.device, errors: Errors) -> dict[str, float]:
    if device.type == "cuda":
        return _gpu_round(calls, device, errors)
    # On one thread the processor's time, which other processes don't lengthen as they do the clock's.
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times = {}
    for name, call in calls.items():
        with reporting(errors, name):
            begin = clock()
            call()
            times[name] = (clock() - begin) * 1e6
    return times


def _gpu_round(calls: Calls, device: torch.device, errors: Errors) -> dict[str, float]:
    """With events, L2 emptied before each call. The GPU is emptying it while the host prepares the call, so that
    the host's time counts only as far as it is longer."""
    flush = _flush_buffer(device)
    events = {}
    for name, call in calls.items():
        with reporting(errors, name):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            begin.record()
            call()
            end.record()
            events[name] = begin, end
    times = {}
    for name, (begin, end) in events.items():
        with reporting(errors, name):
            end.synchronize()
            times[name] = begin.elapsed_time(end) * 1e3
    return times


@lru_cache(maxsize=1)
def _flush_buffer(device: torch.device) -> Tensor:
    return torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)


def _timing(times: Tensor, baseline: Tensor | None) -> Timing:
    low, middle, high = times.quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    return Timing(middle, low, high, None if baseline is None else (times / baseline).median().item())
