"""Other schedules and tiles of the kernels, which a GPU has to choose from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Candidate:
    """Another schedule of one kernel, and other sizes of its tile; one that compiles for sm_90 without spills."""

    kernel: str
    num_warps: int
    num_stages: int
    blocks: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        tile = "".join(f" {name.removeprefix('BLOCK_')}{size}" for name, size in self.blocks)
        return f"{self.kernel} w{self.num_warps} s{self.num_stages}{tile}"


#: Tried in the case of the operation that they belong to.
CANDIDATES = (
    ("linear", Candidate("mix_forward", 8, 3, (("BLOCK_N", 256),))),
    ("linear", Candidate("mix_forward", 8, 4)),
    ("linear", Candidate("mix_backward_weights", 4, 3)),
    ("linear", Candidate("mix_backward_inputs", 8, 4)),
    ("modulation", Candidate("query_forward", 8, 3, (("BLOCK_M", 128),))),
    ("modulation", Candidate("output_forward", 8, 2, (("BLOCK_M", 128),))),
    ("modulation", Candidate("instruction_forward", 4, 3)),
    ("modulation", Candidate("query_forward", 4, 3)),
    ("modulation", Candidate("output_forward", 4, 1)),
    ("modulation", Candidate("output_backward", 8, 2)),
    ("modulation", Candidate("output_weight_backward", 8, 2)),
    ("modulation", Candidate("query_weight_backward", 4, 3)),
    ("modulation", Candidate("key_value_backward", 4, 2)),
)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


#: How many programs kernels need whose tiles change, from their arguments and the sizes of a tile.
_GRIDS: dict[str, Callable[[dict[str, Any], dict[str, int]], int]] = {
    "mix_forward": lambda own, block: (
        len(own["x_ptr"]) * _cdiv(own["N"], block["BLOCK_M"]) * _cdiv(own["D"], block["BLOCK_N"])
    ),
    "query_forward": lambda own, block: _cdiv(own["M"], block["BLOCK_M"]) * _cdiv(own["I"], block["BLOCK_I"]),
    "output_forward": lambda own, block: _cdiv(own["M"], block["BLOCK_M"]) * _cdiv(own["D"], own["channels_a_program"]),
}


def shipped(candidate: Candidate) -> Any:
    """The variant that is changed, of those for the benchmark's shape: bfloat16, heads of 32, all of I in a tile, and
    the large tile."""
    from emma_adapter.kernels import cross_attention, token_mixing

    wanted = {"BLOCK_H": 32, "MODULATE": True, "ONE_TILE": True}
    found = [
        own
        for module in (cross_attention, token_mixing)
        for own in module.configurations()
        if (own.kernel.__name__, own.dtype) == (candidate.kernel, torch.bfloat16)
        and all(dict(own.constants).get(name, value) == value for name, value in wanted.items())
    ]
    return max(found, key=lambda own: dict(own.constants)["BLOCK_M"])


def changed(configuration: Any, candidate: Candidate) -> Any:
    constants = {**dict(configuration.constants), **dict(candidate.blocks)}
    return replace(
        configuration,
        constants=tuple(constants.items()),
        num_warps=candidate.num_warps,
        num_stages=candidate.num_stages,
    )


@contextmanager
def using(candidate: Candidate) -> Iterator[None]:
    """Launches of one kernel with another schedule."""
    from emma_adapter.kernels.launch import Configuration

    launch = Configuration.launch

    def other(self: Any, grid: Any, device: Any, **arguments: Any) -> None:
        if self.kernel.fn.__name__ == candidate.kernel:
            self = changed(self, candidate)
            if candidate.blocks:
                grid = (_GRIDS[candidate.kernel](arguments, dict(self.constants)),)
        launch(self, grid, device, **arguments)

    Configuration.launch = other  # type: ignore[method-assign]
    try:
        yield
    finally:
        Configuration.launch = launch  # type: ignore[method-assign]
