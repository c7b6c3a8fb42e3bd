"""Which implementation runs: PyTorch's own operations ("eager") or the Triton kernels; and a record of what ran."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from ..errors import KernelError

Implementation = Literal["eager", "triton"]
#: What ``EmmaConfig.kernel`` may be.
Kernel = Literal["auto", "eager", "triton"]

_TRITON_INSTALLED = find_spec("triton") is not None
# Triton's interpreter runs kernels on the CPU, for tests.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# As many kinds of call as are remembered: a reason may name sizes, of which there is no end.
_MAX_REMEMBERED = 64


@dataclass(frozen=True)
class KernelUse:
    """What ran for one kind of call.

    Args:
        fusion: name of the fusion.
        runs: ``"triton"``, or ``"eager"`` for PyTorch's own operations.
        reason: why this one.
        device: of the visual tokens.
        dtype: of the visual tokens.
        shape: of the visual tokens in the last such call: ``[B, N, D]``, or ``[M, D]`` if packed; None in a graph
            that ``torch.compile`` traced.
    """

    fusion: str
    runs: Implementation
    reason: str
    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, ...] | None

    def __str__(self) -> str:
        shape = "compiled" if self.shape is None else list(self.shape)
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.fusion} {shape} {dtype} on {self.device}: {self.runs} ({self.reason})"


class Dispatch:
    """Chooses the implementation of one fusion, call by call."""

    def __init__(self, fusion: str, kernel: Kernel) -> None:
        self.fusion = fusion
        self.kernel = kernel
        self._uses: dict[tuple[object, ...], KernelUse] = {}

    def takes_triton(self, visual_tokens: Tensor, problem: Callable[[], str | None]) -> bool:
        """Whether the Triton kernels compute this call.

        Args:
            visual_tokens: ``[B, N, D]``, or ``[M, D]`` if packed.
            problem: says why the kernels can't compute it, or None; asked only where Triton can be imported.

        Raises:
            KernelError: if they should and can't.
        """
        if self.kernel == "eager":
            return self._note("eager", 'kernel="eager"', visual_tokens)
        reason = _no_triton(visual_tokens.device)
        if self.kernel == "auto" and reason is None:
            reason = self._not_measured(visual_tokens)
        reason = reason or problem()
        if reason is None:
            why = 'kernel="triton"' if self.kernel == "triton" else "measured to be as fast on this device"
            return self._note("triton", why, visual_tokens)
        if self.kernel == "triton":
            raise KernelError(
                f'EmmaConfig(kernel="triton") can\'t run fusion={self.fusion!r} here: {reason}. With kernel="auto" '
                'or kernel="eager", PyTorch\'s own operations compute the same'
            )
        return self._note("eager", reason, visual_tokens)

    def report(self) -> tuple[KernelUse, ...]:
        return tuple(self._uses.values())

    def _not_measured(self, visual_tokens: Tensor) -> str | None:
        from ..kernels.measured import is_measured, measured_case

        case = measured_case(self.fusion, visual_tokens.dtype, backward=torch.is_grad_enabled())
        if is_measured(visual_tokens.device, case):
            return None
        return f'{case} was not measured to be as fast on this device; kernel="triton" forces it'

    def _note(self, runs: Implementation, reason: str, visual_tokens: Tensor) -> bool:
        shape = None if torch.compiler.is_compiling() else tuple(visual_tokens.shape)
        use = KernelUse(self.fusion, runs, reason, visual_tokens.device, visual_tokens.dtype, shape)
        key = (runs, reason, use.device, use.dtype, shape is None, visual_tokens.ndim)
        if key in self._uses or len(self._uses) < _MAX_REMEMBERED:
            self._uses[key] = use
        return runs == "triton"


def _no_triton(device: torch.device) -> str | None:
    """Why there is no Triton for a device, or None. Triton, and what imports it, is imported only where it may run."""
    if device.type == "cpu" and not _INTERPRETED:
        return "the visual tokens are on the CPU"
    if not _TRITON_INSTALLED:
        return "triton is not installed"
    from ..kernels.launch import device_problem

    return device_problem(device)
