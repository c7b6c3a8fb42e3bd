"""Where the kernels were measured to be at least as fast as PyTorch: what ``kernel="auto"`` goes by.

``measured.json`` maps the name of a device to ``"operation/dtype/phase"``; ``make bench-gpu`` writes it.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import torch

MEASURED_FILE = Path(__file__).with_name("measured.json")


def measured_case(operation: str, dtype: torch.dtype, *, backward: bool) -> str:
    """What a benchmark measures, as ``measured.json`` names it."""
    return f"{operation}/{str(dtype).removeprefix('torch.')}/{'forward+backward' if backward else 'forward'}"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_measured(device: torch.device, case: str) -> bool:
    """True if the kernels of a case were at least as fast as PyTorch on every benchmarked shape, on such a device."""
    return device.type == "cuda" and case in _measured().get(torch.cuda.get_device_name(device), ())


@lru_cache(maxsize=1)
def _measured() -> dict[str, list[str]]:
    found: dict[str, list[str]] = json.loads(MEASURED_FILE.read_text())
    return found
