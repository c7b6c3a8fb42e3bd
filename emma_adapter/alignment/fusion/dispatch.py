"""The choice between PyTorch's own operations ("eager") and the Triton kernels, and a record of what ran."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...errors import KernelError

Implementation = Literal["eager", "triton"]
#: The values of ``EmmaConfig.kernel``.
Kernel = Literal["auto", "eager", "triton"]

# Triton's interpreter runs kernels on the CPU, for tests.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Kinds of call that are remembered; without a limit there would be ever more, since a reason may name sizes.
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
        # Apart from the others: a compiler that read those would compile again whenever they grow.
        self._traced: tuple[Implementation, str, torch.device, torch.dtype] | None = None

    def takes_triton(self, visual_tokens: Tensor, problem: Callable[[], str | None], *, trains: bool) -> bool:
        """Decide whether the Triton kernels compute this call, and note what does.

        Args:
            visual_tokens: ``[B, N, D]``, or ``[M, D]`` if packed.
            problem: returns why the kernels can't compute it, or None; called only where Triton can be imported.
            trains: whether a backward may follow, also one that computes this call again.

        Raises:
            KernelError: if they can't, and ``kernel="triton"`` says that they must.
        """
        if self.kernel == "eager":
            return self._note("eager", 'kernel="eager"', visual_tokens)
        reason = None
        if visual_tokens.device.type == "cpu" and not _INTERPRETED:
            reason = "the visual tokens are on the CPU"
        elif self.kernel == "auto":
            reason = self._not_measured(visual_tokens, trains)
        reason = reason or _no_triton(visual_tokens.device) or problem()
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
        """Return what ran, each kind of call in the order of its first call."""
        traced = () if self._traced is None else (KernelUse(self.fusion, *self._traced, None),)
        return (*self._uses.values(), *traced)

    def _not_measured(self, visual_tokens: Tensor, trains: bool) -> str | None:
        """Return why the kernels aren't known to be as fast for this call, or None if they are."""
        device, dtype = visual_tokens.device, visual_tokens.dtype
        if dtype == torch.float32 and (torch.is_autocast_enabled(device.type) or torch.backends.cuda.matmul.allow_tf32):
            return "float32 products may be rounded here, by autocast or tf32, and the kernels' are not"
        from ...kernels.measured import least_tokens, measured_case

        case = measured_case(self.fusion, dtype, backward=trains)
        least = least_tokens(device, case)
        if least is None:
            return f'{case} was not measured to be as fast on this device; kernel="triton" forces it'
        if visual_tokens.shape[:-1].numel() < least:
            return f'{case} was measured to be as fast from {least} visual tokens on; kernel="triton" forces it'
        return None

    def _note(self, runs: Implementation, reason: str, visual_tokens: Tensor) -> bool:
        device, dtype = visual_tokens.device, visual_tokens.dtype
        # Not is_exporting(): inside torch.compile of PyTorch 2.11 it is true.
        if torch.compiler.is_dynamo_compiling():
            self._traced = (runs, reason, device, dtype)
            return runs == "triton"
        if torch.compiler.is_compiling():
            return runs == "triton"
        key = (runs, reason, device, dtype, visual_tokens.ndim)
        if key not in self._uses and len(self._uses) >= _MAX_REMEMBERED:
            # Another thread may have taken the oldest one out already.
            self._uses.pop(next(iter(tuple(self._uses))), None)
        self._uses[key] = KernelUse(self.fusion, runs, reason, device, dtype, tuple(visual_tokens.shape))
        return runs == "triton"


def weights_elsewhere(visual_tokens: Tensor, weight: Tensor) -> str | None:
    """Return why the kernels can't read a weight that another tool moves when its module is called, or None."""
    if weight.device == visual_tokens.device:
        return None
    return f"the visual tokens are on {visual_tokens.device} and the adapter's weights on {weight.device}"


def _no_triton(device: torch.device) -> str | None:
    """Return why there is no Triton for a device, or None; Triton is imported only here, where it may run."""
    try:
        from ...kernels.launch import device_problem
    except ImportError as error:
        return f"Triton can't be imported ({error})"
    return device_problem(device)
