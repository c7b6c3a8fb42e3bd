"""All variants of one operation in one setting, measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from statistics import median

import torch
from torch import Tensor

from .machine import Machine
from .memory import kernel_launches, peak_bytes, saved_bytes
from .operations import Operation, Variant
from .records import Record
from .shapes import LLAVA, Phase, Setting
from .timing import Errors, reporting, time_calls

# Largest difference from the baseline, as a share of its largest entry: more is another function.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


OUT_OF_TIME = "not compiled: out of time"


@dataclass
class Budget:
    """Time for ``torch.compile``, which takes most of a run: none begins that would leave too little for the rest."""

    seconds: float
    groups_left: int
    started: float = field(default_factory=time.perf_counter)
    _compiling: list[float] = field(default_factory=list)
    _measuring: list[float] = field(default_factory=list)

    def may_compile(self) -> bool:
        group = 1.0 + (median(self._measuring) if self._measuring else 2.0)
        longest = max(self._compiling, default=30.0)
        return self.elapsed() + self.groups_left * group + 1.5 * longest < self.seconds

    def compiled(self, seconds: float) -> None:
        self._compiling.append(seconds)

    def finished_group(self, seconds: float) -> None:
        """``seconds``: without first calls, which also compile Triton kernels, but not in every group."""
        self._measuring.append(seconds)
        self.groups_left -= 1

    def elapsed(self) -> float:
        return time.perf_counter() - self.started


@dataclass(frozen=True)
class Effort:
    """How long each group is sampled: about ``seconds``, and for ``rounds`` at most."""

    seconds: float
    rounds: int


def compare(
    name: str, operation: Operation, setting: Setting, phase: Phase, machine: Machine, budget: Budget, effort: Effort
) -> list[Record]:
    """A record of each variant, those that failed included."""
    errors: Errors = {}
    calls: dict[str, Callable[[], None]] = {}
    differences: dict[str, float] = {}
    reference: Tensor | None = None
    for variant_name, variant in operation.variants.items():
        if variant.compiled and not budget.may_compile():
            errors[variant_name] = OUT_OF_TIME
            continue
        first = time.perf_counter()
        with reporting(errors, variant_name):
            call = operation.step(variant, phase)
            call()
            if reference is None:
                reference = _output(variant, phase)
            differences[variant_name] = _difference(_output(variant, phase), reference, setting)
            calls[variant_name] = call
        if variant.compiled:
            budget.compiled(time.perf_counter() - first)
    del reference
    began = time.perf_counter()

    timings = time_calls(
        calls, operation.baseline, setting.device, errors, seconds=effort.seconds, rounds=effort.rounds
    )
    records = []
    for variant_name, variant in operation.variants.items():
        record = _blank(name, operation, setting, phase, variant_name)
        if variant_name in timings:
            timing = timings[variant_name]
            record = replace(
                record,
                median_us=timing.median,
                percentile_20_us=timing.percentile_20,
                percentile_80_us=timing.percentile_80,
                ratio=timing.ratio,
                bandwidth_percent=_bandwidth_percent(operation, variant, phase, timing.median, machine),
                tower_percent=_tower_percent(setting, timing.median, machine),
                difference=differences[variant_name],
            )
            with reporting(errors, variant_name):
                call = calls[variant_name]
                record = replace(
                    record,
                    saved_bytes=saved_bytes(operation, variant, phase),
                    peak_bytes=peak_bytes(operation, variant, call, setting.device),
                    launches=kernel_launches(call, setting.device),
                )
        records.append(replace(record, error=errors.get(variant_name)))
    budget.finished_group(time.perf_counter() - began)
    return records


def failed(name: str, setting: Setting, phase: Phase, error: str) -> Record:
    """An operation that could not be set up at all."""
    return replace(_blank(name, None, setting, phase, "all"), error=error)


def _blank(name: str, operation: Operation | None, setting: Setting, phase: Phase, variant: str) -> Record:
    shape = setting.shape
    return Record(
        operation=name,
        phase=phase,
        shape=shape.name,
        num_tokens=shape.num_tokens,
        dim=shape.dim,
        batch=setting.batch,
        dtype=str(setting.dtype).removeprefix("torch."),
        train_vision=setting.train_vision,
        variant=variant,
        baseline=operation.baseline if operation else variant,
        compiled=operation.variants[variant].compiled if operation else False,
    )


def _output(variant: Variant, phase: Phase) -> Tensor:
    with torch.set_grad_enabled(phase != "forward"):
        return variant.run().detach()


def _difference(output: Tensor, reference: Tensor, setting: Setting) -> float:
    difference = ((output - reference).abs().max() / reference.abs().max()).item()
    if not difference <= TOLERANCES[setting.dtype]:  # NaN is neither
        raise ArithmeticError(f"the result differs from the baseline's by {difference:.1%} of its largest entry")
    return difference


def _bandwidth_percent(
    operation: Operation, variant: Variant, phase: Phase, microseconds: float, machine: Machine
) -> float:
    num_parameters = sum(parameter.numel() for parameter in variant.module.parameters())
    least = operation.inputs.least_bytes(phase, num_parameters)
    return 100 * least / (microseconds / 1e6) / machine.copy_bytes_per_second


def _tower_percent(setting: Setting, microseconds: float, machine: Machine) -> float | None:
    tower = machine.tower_us.get(str(setting.batch))
    return None if tower is None or setting.shape != LLAVA else 100 * microseconds / tower
