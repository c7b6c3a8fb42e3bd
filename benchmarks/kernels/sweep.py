"""The stage that tries other schedules and tiles, and a prototype."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .bare_checkout import prepare
from .comparison import TOLERANCES
from .operations import OPERATIONS, Operation
from .profiling import kernel_times
from .schedules import CANDIDATES, changed, shipped, using
from .stage import Run, told


def sweep(run: Run) -> bool:
    """Microseconds of single kernels with other schedules and tiles, beside those that are shipped, and of a prototype;
    each has to give what the shipped ones do."""
    if run.dry:
        prepare()
        from tests.kernels.compilation import compiled as compile_ahead

        _, candidate = CANDIDATES[0]
        compile_ahead(changed(shipped(candidate), candidate), "sm_90")
        run.log(candidate=str(candidate), compiled=True)
        return True
    good = True
    for name in dict.fromkeys(name for name, _ in CANDIDATES):
        operation = OPERATIONS[name](run.setting("LLaVA-1.5", 64))
        variant = operation.variants["triton"]
        step = operation.step(variant, "forward+backward")
        run.log(operation=name, shipped=kernel_times(step, run.device, 10))
        with torch.no_grad():
            expected = variant.run()
        for own, candidate in CANDIDATES:
            if own != name or run.left() < 5:
                continue
            try:
                with using(candidate):
                    with torch.no_grad():
                        found = variant.run()
                    times = kernel_times(step, run.device, 10)
                good &= _tried(run, name, str(candidate), times, candidate.kernel, found, expected)
            except Exception as error:  # noqa: BLE001
                good = False
                run.log(operation=name, candidate=str(candidate), error=told(error))
        if name == "modulation":
            good &= _prototype(run, operation, expected)
    return good


def _prototype(run: Run, operation: Operation, expected: Tensor) -> bool:
    from . import one_program

    inputs, module = operation.inputs, operation.variants["triton"].module
    good = True
    for schedule in one_program.SCHEDULES:
        name = "one program, M{} w{} s{}".format(*schedule)
        try:
            prototype = one_program.OneProgram(module.fusion, inputs.visual, inputs.instruction, inputs.mask)
            call = partial(prototype.run, schedule)
            times = kernel_times(call, run.device, 10)
            good &= _tried(run, "modulation", name, times, "one_program", call(), expected)
        except Exception as error:  # noqa: BLE001
            good = False
            run.log(operation="modulation", candidate=name, error=told(error))
    return good


def _tried(
    run: Run, operation: str, candidate: str, times: dict[str, float], kernel: str, found: Tensor, expected: Tensor
) -> bool:
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    ok = difference <= TOLERANCES[expected.dtype]
    us = sum(time for name, time in times.items() if name.startswith(kernel))
    run.log(operation=operation, candidate=candidate, us_of_kernel=us, difference=difference, ok=ok)
    return ok
