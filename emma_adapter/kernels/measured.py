"""Measurements of where the kernels are as fast as PyTorch, by which ``kernel="auto"`` chooses.

``measured.json`` maps the name of a device to ``"operation/dtype/phase"``, and that to ``{"min_tokens": n}``: with n
visual tokens in a call or more, Triton was nowhere slower than PyTorch by more than a tolerance. null stands for what
was slower at the largest size. ``python -m benchmarks.kernels.publish`` writes it.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import torch

MEASURED_FILE = Path(__file__).with_name("measured.json")

#: By device and case.
Measurements = dict[str, dict[str, dict[str, int] | None]]


def measured_case(operation: str, dtype: torch.dtype, *, backward: bool) -> str:
    """Return the name in ``measured.json`` of what a benchmark measures."""
    return f"{operation}/{str(dtype).removeprefix('torch.')}/{'forward+backward' if backward else 'forward'}"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def least_tokens(device: torch.device, case: str) -> int | None:
    """Return from how many visual tokens on a case's kernels were measured to be as fast on such a device, or None.

    float16 takes the same instructions as bfloat16, and follows it where it was not measured itself.
    """
    if device.type != "cuda":
        return None
    cases = _measured().get(torch.cuda.get_device_name(device), {})
    measured = cases.get(case, cases.get(case.replace("/float16/", "/bfloat16/")))
    return None if measured is None else measured["min_tokens"]


@lru_cache(maxsize=1)
def _measured() -> Measurements:
    measurements: Measurements = json.loads(MEASURED_FILE.read_text())
    return measurements
