"""The kernels on this device against the formula in float64, gradients too."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from emma_adapter import EmmaAlignment, EmmaConfig, Packing

#: Relative to the largest value: forward, gradients. As in the tests of the kernels.
TOLERANCES = {torch.float32: (1e-5, 1e-5), torch.float16: (2e-3, 5e-3), torch.bfloat16: (1e-2, 2e-2)}
_BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


@dataclass(frozen=True)
class Size:
    """Images of one grid; or, with ``grids``, images of those, packed."""

    name: str
    grid: tuple[int, int]
    width: int
    batch: int
    grids: tuple[tuple[int, int], ...] = ()
    instruction: tuple[int, int] = (77, 768)


REAL = (
    Size("LLaVA-1.5", (24, 24), 1024, 5),
    Size("LLaVA-OneVision", (27, 27), 1152, 3),
    Size("ragged", (5, 7), 80, 3),
    Size("packed", (24, 24), 1280, 5, ((64, 48), (2, 2), (34, 58), (24, 24), (64, 48))),
    Size("ragged, packed", (5, 7), 80, 4, ((5, 7), (1, 1), (20, 9), (5, 7))),
)
TINY = (
    Size("tiny", (3, 3), 48, 3, instruction=(9, 24)),
    Size("tiny, packed", (3, 3), 48, 4, ((3, 3), (1, 1), (2, 4), (3, 3)), (9, 24)),
)


@dataclass(frozen=True)
class Inputs:
    visual: Tensor
    instruction: Tensor
    mask: Tensor
    packing: Packing | None

    def to(self, dtype: torch.dtype) -> Inputs:
        return Inputs(self.visual.to(dtype), self.instruction.to(dtype), self.mask, self.packing)


def make(operation: str, size: Size, device: torch.device, *, trained: bool = True) -> EmmaAlignment:
    """With the kernels; as after some training, no weight is zero."""
    length, width = size.instruction
    torch.manual_seed(1)
    alignment = EmmaAlignment(
        EmmaConfig(
            fusion=operation,
            kernel="triton",
            visual_dim=size.width,
            instruction_dim=width,
            visual_grid=size.grid,
            max_instruction_tokens=length,
        )
    )
    if trained:
        with torch.no_grad():
            for parameter in alignment.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    return alignment.to(device)


def inputs(size: Size, dtype: torch.dtype, device: torch.device) -> Inputs:
    """The second instruction is empty, the others are of several lengths."""
    length, width = size.instruction
    generator = torch.Generator().manual_seed(2)
    grids = size.grids or (size.grid,) * size.batch
    visual = torch.randn(sum(h * w for h, w in grids), size.width, generator=generator)
    rows = torch.tensor([0, 2, 2, 1, 0])[: len(grids)]
    packing = Packing(grids, rows.to(device)) if size.grids else None
    if packing is None:
        visual = visual.view(size.batch, -1, size.width)
    valid = torch.tensor([length, 0, 9, 40, 8])[: size.batch].clamp_max(length)
    return Inputs(
        visual.to(device, dtype),
        torch.randn(size.batch, length, width, generator=generator).to(device, dtype),
        (torch.arange(length) < valid[:, None]).to(device),
        packing,
    )


def results(alignment: EmmaAlignment, given: Inputs) -> dict[str, Tensor]:
    """The output and all gradients, for a fixed gradient of the output."""
    visual = given.visual.clone().requires_grad_()
    alignment.zero_grad()
    output = alignment(visual, given.instruction, given.mask, packing=given.packing)
    generator = torch.Generator().manual_seed(3)
    output.backward(torch.randn(output.shape, generator=generator).to(output.device, output.dtype))
    assert visual.grad is not None
    gradients = {name: p.grad.clone() for name, p in alignment.named_parameters() if p.grad is not None}
    return {"output": output.detach(), "visual tokens": visual.grad, **gradients}


def compare(operation: str, size: Size, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """An entry for the log. ``ok`` if the kernels ran, all errors are within the tolerances, and the second time gives
    the same bits."""
    alignment, given = make(operation, size, device), inputs(size, dtype, device)
    found, again = results(alignment, given), results(alignment, given)
    ran = sorted({use.runs for use in alignment.kernel_report()})
    eager = copy.deepcopy(alignment)
    eager.use_kernel("eager")
    plain = results(eager, given)
    exact = results(eager.double(), given.to(torch.float64))
    forward, backward = TOLERANCES[dtype]
    errors, wrong, beyond = {}, [], []
    for name, value in exact.items():
        scale = value.abs().max().clamp_min(1e-6)
        own, usual = (((x[name].double() - value).abs().max() / scale).item() for x in (found, plain))
        errors[name] = f"{own:.1e} (PyTorch {usual:.1e})"
        if not own <= (forward if name == "output" else backward):  # NaN is neither
            wrong.append(name)
        if not own <= 2 * usual + torch.finfo(dtype).eps:
            beyond.append(name)
    same_bits = all(torch.equal(found[name], again[name]) for name in found)
    missing = sorted(exact.keys() - found.keys())
    return {
        "case": f"{operation}, {size.name}, {dtype}".replace("torch.", ""),
        "ok": not wrong and not missing and same_bits and ran == ["triton"],
        "ran": ran,
        "wrong": wrong + missing,
        "more_than_twice_pytorch": beyond,
        "same_bits": same_bits,
        "errors": errors,
    }


def identity(operation: str, size: Size, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """An entry for the log: whether an untrained adapter gives back the visual tokens' own bits."""
    alignment, given = make(operation, size, device, trained=False), inputs(size, dtype, device)
    given.visual.view(-1, size.width)[:5] = -0.0
    with torch.no_grad():
        output = alignment(given.visual, given.instruction, given.mask, packing=given.packing)
    same = torch.equal(output.view(_BITS[dtype]), given.visual.view(_BITS[dtype]))
    return {"case": f"{operation}, {size.name}, {dtype}, untrained".replace("torch.", ""), "ok": same}


def checks(
    operation: str, dtype: torch.dtype, device: torch.device, sizes: tuple[Size, ...]
) -> Iterator[Callable[[], dict[str, Any]]]:
    """``linear`` has weights for one number of tokens: no packed images."""
    for size in sizes:
        if operation == "linear" and size.grids:
            continue
        for check in (compare, identity):
            yield partial(check, operation, size, dtype, device)
