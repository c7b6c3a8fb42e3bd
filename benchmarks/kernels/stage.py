"""What every stage of the GPU quarter hour is given."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from .gpu_quarter_hour import Log
from .shapes import SHAPES, Setting, Shape

#: Operation, shape and batch, in order of importance. ``modulation`` is the default fusion.
CASES = (
    ("modulation", "LLaVA-1.5", 64),
    ("modulation", "Qwen2.5-VL, packed", 1),
    ("linear", "LLaVA-1.5", 64),
    ("modulation", "LLaVA-1.5", 1),
    ("linear", "LLaVA-1.5", 1),
    ("attention", "LLaVA-1.5", 64),
)
_SMALL = Shape("small", 16, 32, instruction_tokens=8, instruction_dim=24)


@dataclass(frozen=True)
class Run:
    """What a stage is given. ``seconds``: after which it is killed. ``dry``: there is no GPU."""

    log: Log
    seconds: float
    dry: bool
    began: float

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.dry else torch.device("cuda", torch.cuda.current_device())

    def left(self) -> float:
        return self.seconds - (time.perf_counter() - self.began)

    def setting(self, shape: str, batch: int) -> Setting:
        if self.dry:
            return Setting(_SMALL, 1, torch.float32, self.device)
        return Setting(next(own for own in SHAPES if own.name == shape), batch, torch.bfloat16, self.device)


def told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:400]
