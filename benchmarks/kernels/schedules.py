"""Other schedules of the kernels, which a GPU has to choose from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Candidate:
    """Another schedule of one kernel; one that compiles for sm_90 without spills."""

    kernel: str
    num_warps: int
    num_stages: int

    def __str__(self) -> str:
        return f"{self.kernel} w{self.num_warps} s{self.num_stages}"


#: Tried in the case of the operation that they belong to.
CANDIDATES = (
    ("linear", Candidate("mix_forward", 8, 4)),
    ("linear", Candidate("mix_backward_weights", 4, 3)),
    ("linear", Candidate("mix_backward_inputs", 8, 4)),
    ("modulation", Candidate("query_forward", 4, 3)),
    ("modulation", Candidate("output_forward", 4, 1)),
    ("modulation", Candidate("output_backward", 8, 2)),
    ("modulation", Candidate("output_weight_backward", 8, 2)),
    ("modulation", Candidate("query_weight_backward", 4, 3)),
    ("modulation", Candidate("key_value_backward", 4, 2)),
)


def changed(configuration: Any, candidate: Candidate) -> Any:
    return replace(configuration, num_warps=candidate.num_warps, num_stages=candidate.num_stages)


@contextmanager
def using(candidate: Candidate) -> Iterator[None]:
    """Launches of one kernel with another schedule."""
    from emma_adapter.kernels.launch import Configuration

    launch = Configuration.launch

    def other(self: Any, grid: Any, device: Any, **arguments: Any) -> None:
        own = changed(self, candidate) if self.kernel.__name__ == candidate.kernel else self
        launch(own, grid, device, **arguments)

    Configuration.launch = other  # type: ignore[method-assign]
    try:
        yield
    finally:
        Configuration.launch = launch  # type: ignore[method-assign]
