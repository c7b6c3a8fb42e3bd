"""Time of single kernels on the GPU, and of single launches on the host."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch


def kernel_times(step: Callable[[], object], device: torch.device, repeats: int = 20) -> dict[str, float]:
    """Mean microseconds a call, of the kernels that take longest; the L2 cache is emptied before each call. On a CPU,
    of operators."""
    gpu = device.type == "cuda"
    repeats = repeats if gpu else 2
    for _ in range(3):
        step()
    flush = torch.empty((256 << 20) if gpu else 1, dtype=torch.int8, device=device)
    activity = torch.profiler.ProfilerActivity.CUDA if gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profile:
        for _ in range(repeats):
            flush.zero_()
            step()
        if gpu:
            torch.cuda.synchronize()
    times: dict[str, float] = {}
    for event in profile.key_averages():
        name = event.key[:80]  # Of templates, which may differ further on.
        times[name] = (
            times.get(name, 0) + (event.self_device_time_total if gpu else event.self_cpu_time_total) / repeats
        )
    longest = sorted(times.items(), key=lambda entry: -entry[1])
    return {name: round(us, 1) for name, us in longest if us > 0 and "Memset" not in name}


def host_times(call: Callable[[], object], device: torch.device, *, repeats: int) -> tuple[float, dict[str, float]]:
    """Median microseconds of a call until it returns, the GPU idle before; and of the launches of each kernel in it."""
    from emma_adapter.kernels.launch import Configuration

    launch = Configuration.launch
    inside: dict[str, list[float]] = {}

    def timed(self: Any, *given: Any, **arguments: Any) -> None:
        began = time.perf_counter()
        launch(self, *given, **arguments)
        inside.setdefault(self.kernel.fn.__name__, []).append((time.perf_counter() - began) * 1e6)

    calls = []
    for measured in (False, True):
        # The calls are timed without a clock around each launch.
        Configuration.launch = timed if measured else launch  # type: ignore[method-assign]
        try:
            for number in range(repeats + 3):
                if device.type == "cuda":
                    torch.cuda.synchronize()
                began = time.perf_counter()
                call()
                if not measured and number >= 3:
                    calls.append((time.perf_counter() - began) * 1e6)
        finally:
            Configuration.launch = launch  # type: ignore[method-assign]
    return round(median(calls), 1), {name: round(median(times), 1) for name, times in inside.items()}
