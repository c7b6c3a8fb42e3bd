"""Memory and kernel launches of one variant."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import DeviceType

from .operations import Operation, Variant
from .shapes import Phase


def saved_bytes(operation: Operation, variant: Variant, phase: Phase) -> int | None:
    """What is kept for backward, other than inputs and parameters."""
    if phase == "forward":
        return None
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        # Held, so that no address is given out twice.
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    inputs = operation.inputs
    given = (inputs.visual, inputs.instruction, inputs.mask, *variant.module.parameters())
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        variant.run()
    known = {tensor.untyped_storage().data_ptr() for tensor in given}
    return sum(tensor.untyped_storage().nbytes() for pointer, tensor in saved.items() if pointer not in known)


def peak_bytes(operation: Operation, variant: Variant, call: Callable[[], None], device: torch.device) -> int | None:
    """Above inputs and parameters, gradients included; known on a GPU alone."""
    if device.type != "cuda":
        return None
    for leaf in operation.leaves(variant):
        leaf.grad = None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return torch.cuda.max_memory_allocated(device) - before


def kernel_launches(call: Callable[[], None], device: torch.device) -> int | None:
    """Kernels that the GPU ran; copies and fills by its copy engines are none."""
    if device.type != "cuda":
        return None
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize(device)
    return count_kernels(profile.events() or ())


def count_kernels(events: Iterable[Any]) -> int:
    """Of a profile's events. Annotations made on the host, which are repeated on the GPU's time line under the same
    name, are no kernels."""
    events = list(events)
    on_host = {event.name for event in events if event.device_type == DeviceType.CPU}
    return sum(
        event.device_type == DeviceType.CUDA
        and event.name not in on_host
        and not event.name.startswith(("Memcpy", "Memset"))
        for event in events
    )
