"""Shared by all kernels: launches, described by values that tests can compile without a GPU, and exact products."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from triton.compiler import CompiledKernel

from ..errors import KernelError

#: Whether kernels run on CPU tensors, in Triton's interpreter (``TRITON_INTERPRET=1`` before Triton is imported).
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

#: Whether compiled kernels are launched without Triton's look-up. Its interpreter compiles none, and for AMD's GPUs it
#: specialises code on more than :func:`specialisation` knows.
DIRECT = not INTERPRETED.value and torch.version.hip is None

TRITON_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])

#: The dtypes that visual tokens may have.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

TRITON_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.uint8: "u8",
}


@triton.jit
def dot(a, b, accumulator):
    """Return ``accumulator + a b``, summed in float32; float32 factors are not rounded to tf32."""
    if INTERPRETED:  # The interpreter multiplies the raw bits of bfloat16.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision="ieee")


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """Round float32 to the nearest number of ``dtype``."""
    if dtype == tl.float32:
        return x
    if INTERPRETED and dtype == tl.bfloat16:
        # The interpreter cuts the lower bits off, whatever rounding it is asked for.
        bits = x.to(tl.int32, bitcast=True)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
        x = tl.where(x == x, nearest, x)  # noqa: PLR0124 (NaN has no neighbours)
    return x.to(dtype)


def specialisation(value: Any) -> Any:
    """Return the properties of an argument for which Triton may compile another kernel.

    They are a tensor's dtype, and whether its address is divisible by 16; an integer's width, and whether it is 1 or
    divisible by 16; and nothing of a float.
    """
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if type(value) is int:
        return value == 1, value % 16 == 0, -(2**31) <= value < 2**31, value < 2**63
    return float if type(value) is float else value


@dataclass(frozen=True)
class Configuration:
    """One compiled variant of a kernel. ``types`` are those of its pointers, where they are not ``dtype``."""

    kernel: Any
    dtype: torch.dtype
    types: tuple[tuple[str, torch.dtype], ...]
    constants: tuple[tuple[str, int], ...]
    num_warps: int
    num_stages: int
    #: Triton's compiled kernels, by device and everything that it specialises code on.
    compiled: dict[tuple[Any, ...], CompiledKernel] = field(default_factory=dict, init=False, repr=False, compare=False)

    def launch(self, grid: tuple[int, ...], device: torch.device, **arguments: Any) -> None:
        """Launch the kernel on the current stream of a device.

        The first time, Triton binds the arguments, looks the compiled kernel up and launches it, which takes as long as
        a small kernel. From then on the same compiled kernel is launched with the same arguments as Triton would pass.
        """
        if 0 in grid:  # CUDA refuses an empty grid.
            return
        # Triton launches on the current device, whichever the tensors are on.
        elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
        with torch.cuda.device(device) if elsewhere else contextlib.nullcontext():
            if not DIRECT:
                self._bind_and_launch(grid, arguments)
                return
            values = [arguments[name] for name in self._passed]
            key = (device.index, *map(specialisation, values))
            compiled = self.compiled.get(key)
            if compiled is not None:
                # In the order of the kernel's parameters, in which constants come last.
                compiled[(*grid, 1, 1)[:3]](*values, *self._constants)
                return
            compiled = self._bind_and_launch(grid, arguments)
            if isinstance(compiled, CompiledKernel):
                self.compiled[key] = compiled

    def _bind_and_launch(self, grid: tuple[int, ...], arguments: dict[str, Any]) -> Any:
        return self.kernel[grid](**arguments, **dict(self.constants), **self.options())

    @cached_property
    def _passed(self) -> tuple[str, ...]:
        """The parameters that aren't constants, which come first."""
        constants = dict(self.constants)
        return tuple(name for name in self.kernel.arg_names if name not in constants)

    @cached_property
    def _constants(self) -> tuple[int, ...]:
        constants = dict(self.constants)
        return tuple(constants[name] for name in self.kernel.arg_names[len(self._passed) :])

    def options(self) -> dict[str, Any]:
        """Return the options of Triton's compiler."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}

    def signature(self) -> dict[str, str]:
        """Return the type of each parameter, as :meth:`launch` passes it."""
        constants, types = dict(self.constants), dict(self.types)
        signature = {}
        for parameter in self.kernel.params:
            name = parameter.name
            if name in constants:
                signature[name] = "constexpr"
            elif name.endswith("_ptr"):
                signature[name] = "*" + TRITON_TYPES[types.get(name, self.dtype)]
            else:
                signature[name] = "fp32" if name in ("eps", "scale") else "i32"
        return signature

    def divisible_by_16(self) -> list[int]:
        """Return the indices of the parameters that code is specialised on: only aligned pointers and widths."""
        return [
            index
            for index, parameter in enumerate(self.kernel.params)
            if self.signature()[parameter.name] not in ("constexpr", "fp32")
            and not parameter.do_not_specialize
            and not (parameter.name.endswith("_ptr") and parameter.do_not_specialize_on_alignment)
        ]


@torch.compiler.assume_constant_result
def device_problem(device: torch.device) -> str | None:
    """Return why kernels can't run on a device, or None; while tracing, asked only once."""
    if INTERPRETED.value and device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"Triton's kernels run on GPUs, and the visual tokens are on {device}"
    if torch.version.hip is not None:
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"the kernels need compute capability 8.0, and {torch.cuda.get_device_name(device)} has less"
    if capability >= (10, 0) and TRITON_VERSION < (3, 8):
        return (
            f"Triton {triton.__version__} can't compile the kernels for {torch.cuda.get_device_name(device)}: its "
            "compiler crashes there; Triton 3.8 can"
        )
    return None


def visual_tokens_problem(visual_tokens: Tensor) -> str | None:
    """Return why no kernel can take visual tokens ``[..., D]``, because of device, dtype or width, or None."""
    if problem := device_problem(visual_tokens.device):
        return problem
    if visual_tokens.dtype not in DTYPES:
        return f"the kernels compute in float32, float16 and bfloat16, not in {visual_tokens.dtype}"
    width = visual_tokens.shape[-1]
    if width < 16 or width % 16:
        return f"the width of the visual tokens must be a multiple of 16; got {width}"
    return None


def refuse_forward_mode(*tensors: Tensor) -> None:
    """Refuse forward mode: the operators have no derivative there, and PyTorch would take it for zero.

    Raises:
        KernelError: if a tensor has a tangent.
    """
    if not torch.compiler.is_compiling() and any(unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise KernelError('the Triton kernels have no forward-mode derivative (torch.func.jvp); use kernel="eager"')


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def aligned(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor as the kernels are compiled for: contiguous, at an address divisible by 16, in ``dtype``."""
    tensor = tensor.detach().to(dtype or tensor.dtype).contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
