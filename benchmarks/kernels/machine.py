"""The machine: its name, how fast it copies, and how long a real vision tower takes on it."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

from .timing import time_calls

_COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 28}


@dataclass
class Machine:
    """``tower_us``: microseconds of the vision tower's forward, by batch size as text."""

    device: str
    kind: str
    torch: str
    triton: str | None
    cuda: str | None
    python: str
    threads: int
    date: str
    command: str
    copy_bytes_per_second: float
    tower_us: dict[str, float] = field(default_factory=dict)


def describe_machine(device: torch.device, *, date: str, command: str) -> Machine:
    return Machine(
        device=device_name(device),
        kind=device.type,
        torch=torch.__version__,
        triton=_version("triton"),
        cuda=torch.version.cuda if device.type == "cuda" else None,
        python=platform.python_version(),
        threads=torch.get_num_threads(),
        date=date,
        command=command,
        copy_bytes_per_second=copy_bandwidth(device),
    )


def device_name(device: torch.device) -> str:
    """On a GPU the name by which ``kernel="auto"`` looks up what was measured."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {platform.machine()}"


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written a second, by a copy larger than any cache."""
    source = torch.zeros(_COPY_BYTES[device.type] // 4, device=device)
    target = torch.zeros_like(source)
    seconds = median_microseconds(lambda: target.copy_(source), device, rounds=15) / 1e6
    return 2 * source.nbytes / seconds


def tower_config() -> Any:
    """Of LLaVA-1.5's vision tower, CLIP ViT-L/14 at 336 pixels: 576 tokens of width 1024."""
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )


@torch.no_grad()
def tower_microseconds(batch: int, dtype: torch.dtype, device: torch.device) -> float:
    """Forward of LLaVA-1.5's vision tower with random weights.

    Forward alone, also as a share of training steps: the tower is frozen.
    """
    from transformers import CLIPVisionModel

    with device:
        tower: nn.Module = CLIPVisionModel(tower_config())
        tower.to(dtype).eval()
        pixels = torch.randn(batch, 3, 336, 336, dtype=dtype)
    rounds = 15 if device.type == "cuda" else 5
    return median_microseconds(lambda: tower(pixels), device, rounds=rounds)


def median_microseconds(call: Callable[[], object], device: torch.device, *, rounds: int) -> float:
    errors: dict[str, str] = {}
    timings = time_calls({"call": call}, "call", device, errors, seconds=60, rounds=rounds)
    if errors:
        raise RuntimeError(errors["call"])
    return timings["call"].median


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
