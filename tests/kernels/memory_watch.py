"""What Triton's interpreter doesn't look at: whether a kernel stays inside its tensors, and whether programs meet.

A GPU runs the programs of a launch in any order and at once; the interpreter runs one after another, so that reading
what another program wrote, or writing where it wrote, goes unnoticed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from triton.runtime.interpreter import InterpreterBuilder

from emma_adapter.kernels.launch import Configuration


class Region:
    """The memory of one tensor, and which program wrote each of its elements."""

    def __init__(self, name: str, tensor: torch.Tensor) -> None:
        self.name = name
        self.start, self.item = tensor.data_ptr(), tensor.element_size()
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        self.writer = np.full(last + 1 if tensor.numel() else 0, -1, np.int64)

    def places(self, addresses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        inside = (addresses >= self.start) & (addresses < self.start + self.item * len(self.writer))
        return inside, (addresses[inside] - self.start) // self.item


class MemoryWatch:
    """``problems`` names the kernel, the tensor and what was wrong; ``launches`` counts what was watched."""

    def __init__(self) -> None:
        self.problems: set[tuple[str, str, str]] = set()
        self.launches = 0
        self._kernel = ""
        self._regions: list[Region] = []

    def begin(self, kernel: str, tensors: dict[str, torch.Tensor]) -> None:
        self._kernel = kernel
        self._regions = [Region(name, tensor) for name, tensor in tensors.items()]
        self.launches += 1

    def accessed(self, pointers: np.ndarray, mask: np.ndarray, program: int, *, writes: bool) -> np.ndarray:
        """The mask of what may be accessed without harm."""
        shape = np.broadcast_shapes(pointers.shape, mask.shape)
        enabled = np.broadcast_to(mask, shape).astype(bool)
        addresses = np.broadcast_to(pointers, shape)[enabled].astype(np.int64)
        found = np.zeros(addresses.shape, bool)
        for region in self._regions:
            inside, places = region.places(addresses)
            # The same tensor may be handed in twice, where one of them isn't used.
            fresh = inside & ~found
            places = places[fresh[inside]]
            found |= inside
            writers = region.writer[places]
            if writes:
                if len(np.unique(places)) < len(places) or (writers >= 0).any():
                    self._report(region.name, "written twice")
                region.writer[places] = program
            elif (writers >= 0).any():
                self._report(region.name, "read after it was written")
        if not found.all():
            self._report("?", "outside of every tensor")
        harmless = enabled.copy()
        harmless[enabled] = found
        return harmless

    def _report(self, tensor: str, what: str) -> None:
        self.problems.add((self._kernel, tensor, what))


@contextmanager
def watching() -> Iterator[MemoryWatch]:
    """Look at every masked load and store of the kernels that are launched inside."""
    watch = MemoryWatch()
    load, store, launch = (
        InterpreterBuilder.create_masked_load,
        InterpreterBuilder.create_masked_store,
        Configuration.launch,
    )

    def program(builder: InterpreterBuilder) -> int:
        (x, y, z), (_, height, depth) = builder.grid_idx, builder.grid_dim
        return (x * height + y) * depth + z

    def watched_load(self, pointers, mask, *rest):
        harmless = watch.accessed(pointers.data, mask.data, program(self), writes=False)
        return load(self, pointers, type(mask)(harmless, mask.dtype), *rest)

    def watched_store(self, pointers, value, mask, *rest):
        harmless = watch.accessed(pointers.data, mask.data, program(self), writes=True)
        return store(self, pointers, value, type(mask)(harmless, mask.dtype), *rest)

    def watched_launch(self, grid, device, **arguments):
        assert set(arguments) <= set(self.kernel.arg_names)
        watch.begin(self.kernel.fn.__name__, {k: v for k, v in arguments.items() if isinstance(v, torch.Tensor)})
        launch(self, grid, device, **arguments)

    InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = watched_load, watched_store
    Configuration.launch = watched_launch
    try:
        yield watch
    finally:
        InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = load, store
        Configuration.launch = launch
