"""Where the kernels were measured to be as fast as PyTorch: what ``kernel="auto"`` goes by.

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
    """What a benchmark measures, as ``measured.json`` names it."""
    return f"{operation}/{str(dtype).removeprefix('torch.')}/{'forward+backward' if backward else 'forward'}"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def least_tokens(device: torch.device, case: str) -> int | None:
    """From how many visual tokens on the kernels of a case were measured to be as fast, on such a device; or None.

    float16 takes the same instructions as bfloat16, and follows it where it was not measured itself.
    """
    if device.type != "cuda":
        return None
    cases = _measured().get(torch.cuda.get_device_name(device), {})
    found = cases.get(case, cases.get(case.replace("/float16/", "/bfloat16/")))
    return None if found is None else found["min_tokens"]


@lru_cache(maxsize=1)
def _measured() -> Measurements:
    found: Measurements = json.loads(MEASURED_FILE.read_text())
    return found
