"""Ahead-of-time compilation for GPUs that need not be there, and what the compiler says about the result."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from emma_adapter.kernels.launch import Configuration

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
#: Bytes of shared memory that one program may have, on the smallest GPU of that generation or a related one (sm_86,
#: sm_120).
SHARED_MEMORY = {"sm_80": 101_376, "sm_90": 101_376, "sm_100": 101_376, "gfx942": 65_536}


def name_of(configuration: Configuration) -> str:
    told = ("BLOCK_M", "BLOCK_H", "MODULATE", "ONE_TILE")
    shown = {name: value for name, value in configuration.constants if name in told}
    weights = dict(configuration.types).get("key_weight_ptr", configuration.dtype)
    dtypes = (str(dtype).removeprefix("torch.") for dtype in dict.fromkeys((configuration.dtype, weights)))
    return "-".join([configuration.kernel.__name__, *dtypes, *(f"{name}={value}" for name, value in shown.items())])


def compiled(configuration: Configuration, target: str, *, unaligned: tuple[str, ...] = ()):
    """``unaligned``: sizes that 16 doesn't divide."""
    names = configuration.kernel.arg_names
    attributes = [index for index in configuration.divisible_by_16() if names[index] not in unaligned]
    return triton.compile(
        ASTSource(
            configuration.kernel,
            signature=configuration.signature(),
            constexprs=dict(configuration.constants),
            attrs={(index,): [["tt.divisibility", 16]] for index in attributes},
        ),
        target=TARGETS.get(target) or GPUTarget("cuda", int(target.removeprefix("sm_")), 32),
        options=configuration.options(),
    )


def local_memory(kernel, target: str, folder: Path) -> int:
    """Bytes or registers that a thread spills to memory, as the machine code says."""
    if target.startswith("gfx"):
        fields = re.findall(r"\.(?:vgpr_spill_count|private_segment_fixed_size):\s*(\d+)", kernel.asm["amdgcn"])
        assert len(fields) == 2
        return sum(map(int, fields))
    (folder / "kernel.cubin").write_bytes(kernel.asm["cubin"])
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    report = subprocess.run(
        [cuobjdump, "--dump-resource-usage", folder / "kernel.cubin"], capture_output=True, text=True, check=True
    ).stdout
    stack, local = re.search(r"STACK:(\d+).*LOCAL:(\d+)", report).groups()
    return int(stack) + int(local)


def transposed_products(ttir: str) -> list[str]:
    """Lines of Triton's intermediate code that transpose what is computed from the result of a ``dot``."""
    operands: dict[str, list[str]] = {}
    products: set[str] = set()
    open_results: list[str] = []
    transposed: list[tuple[str, str]] = []
    for line in ttir.splitlines():
        code = re.sub(r"\bloc\(.*", "", line).strip()
        used = re.findall(r"%[\w.$-]+", code)
        made = re.match(r"(%[\w.$-]+)(?::\d+)? = ([\w.]+)", code)
        name, operation = made.groups() if made else ("", code.partition(" ")[0])
        if operation == "scf.yield" and open_results:
            operands.setdefault(open_results[-1], []).extend(used)
        elif made and operation not in ("tt.load", "arith.constant"):
            operands[name] = used[1:]
            if operation == "tt.dot":
                products.add(name)
            elif operation == "tt.trans":
                transposed.append((name, code))
        if code.endswith("{"):
            if not code.startswith("}"):
                open_results.append(name)
        elif code.startswith("}") and open_results:
            open_results.pop()

    def from_product(value: str, seen: set[str]) -> bool:
        if value in products:
            return True
        if value in seen:
            return False
        seen.add(value)
        return any(from_product(operand, seen) for operand in operands.get(value, []))

    return [code for name, code in transposed if from_product(name, set())]
