"""Runs a load on threads, and takes samples between the calls."""

from __future__ import annotations

import gc
import random
import threading
import time
import traceback
from collections.abc import Callable, Iterator

from .figures import Sample, take_sample
from .load import CALLS, Served, Workshop

#: A call of these models takes a fraction of a second; on a machine that is busy otherwise, more.
_HANGS_AFTER = 300
_MOST_FAILURES = 10
#: However little time there is, or however slow the machine: fewer would tell nothing.
_FEWEST_SAMPLES, _FEWEST_CALLS = 12, 10


class Soak:
    """Threads that call a model, each with dice of its own, until they are stopped."""

    def __init__(self, *, threads: int, seed: int) -> None:
        self.served = Served()
        workshop = Workshop(self.served)
        self.calls = [0] * (threads + 1)
        #: What calls raised that they shouldn't have.
        self.failures: list[str] = []
        self._stopping = threading.Event()
        self._pausing = threading.Event()
        self._barrier = threading.Barrier(threads + 2)
        works: list[Callable[[random.Random], None]] = [workshop.work, *[self._call] * threads]
        self._threads = [
            threading.Thread(target=self._repeat, args=(number, work, random.Random(f"{seed} {number}")), daemon=True)
            for number, work in enumerate(works)
        ]

    def samples(self, seconds: float, interval: float) -> Iterator[Sample]:
        """One for each interval, at least a dozen. Answers are compared while calls are running; the rest is measured
        between them."""
        # What is there now, libraries above all, is neither collected nor counted any more.
        gc.collect()
        gc.freeze()
        started = time.perf_counter()
        for thread in self._threads:
            thread.start()
        try:
            number = calls = 0
            while number < _FEWEST_SAMPLES or time.perf_counter() - started < seconds:
                number += 1
                self._wait(started + number * interval, calls + _FEWEST_CALLS)
                drifted = self.served.drifted()
                self._pausing.set()
                self._barrier.wait(_HANGS_AFTER)
                calls = sum(self.calls)
                passed = time.perf_counter() - started
                sample = take_sample(self.served.adapter, seconds=passed, calls=calls, drifted=drifted)
                self._pausing.clear()
                self._barrier.wait(_HANGS_AFTER)
                yield sample
        finally:
            self._stopping.set()
            self._barrier.abort()
            for thread in self._threads:
                thread.join(_HANGS_AFTER)
            gc.unfreeze()

    def _wait(self, until: float, calls: int) -> None:
        """Until that moment, and until so many calls were made, unless they hang."""
        time.sleep(max(0.0, until - time.perf_counter()))
        given_up = time.perf_counter() + _HANGS_AFTER
        while sum(self.calls) < calls and time.perf_counter() < given_up:
            time.sleep(0.05)

    def _call(self, dice: random.Random) -> None:
        dice.choice(CALLS)(self.served, dice)

    def _repeat(self, number: int, work: Callable[[random.Random], None], dice: random.Random) -> None:
        while not self._stopping.is_set():
            if self._pausing.is_set():
                try:
                    self._barrier.wait(_HANGS_AFTER)
                    self._barrier.wait(_HANGS_AFTER)
                except threading.BrokenBarrierError:
                    return
            try:
                work(dice)
            except Exception:  # noqa: BLE001 - told at the end, and the load goes on
                if len(self.failures) < _MOST_FAILURES:
                    self.failures.append(traceback.format_exc())
            self.calls[number] += 1
