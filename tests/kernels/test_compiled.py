"""Every variant that can be dispatched is compiled for GPUs that need not be there."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch

triton = pytest.importorskip("triton")

from benchmarks.kernels import one_program  # noqa: E402
from benchmarks.kernels.schedules import CANDIDATES, changed, shipped  # noqa: E402
from emma_adapter import KernelError  # noqa: E402
from emma_adapter.kernels import cross_attention, token_mixing  # noqa: E402
from emma_adapter.kernels.launch import TRITON_VERSION, Configuration  # noqa: E402
from tests.kernels.compilation import SHARED_MEMORY, TARGETS, compiled, local_memory, name_of, transposed_products  # noqa: E402
from tests.support import budget  # noqa: E402

#: Of the oldest Triton, what it was measured with; for sm_100 its compiler crashes, and `device_problem` says so.
SUPPORTED = TARGETS if TRITON_VERSION >= (3, 8) else {"sm_90": TARGETS["sm_90"]}
OPERATIONS = (cross_attention, token_mixing)
CONFIGURATIONS = [configuration for operation in OPERATIONS for configuration in operation.configurations()]


def test_names_are_unique():
    names = [name_of(configuration) for configuration in CONFIGURATIONS]
    assert len(set(names)) == len(names)


def size_of(configuration: Configuration) -> int:
    """How many values a program holds: what registers, and shared memory, may not suffice for."""
    return math.prod(value for name, value in configuration.constants if name.startswith("BLOCK"))


def targets_of(configuration: Configuration) -> list[str]:
    """Of the everyday tier: one GPU for all, the others for the largest of each kernel."""
    own = [other for other in CONFIGURATIONS if other.kernel is configuration.kernel]
    return list(SUPPORTED) if budget.FULL or configuration is max(own, key=size_of) else ["sm_90"]


@pytest.mark.parametrize(
    ("configuration", "target"),
    [(configuration, target) for configuration in CONFIGURATIONS for target in targets_of(configuration)],
    ids=lambda value: value if isinstance(value, str) else name_of(value),
)
def test_compiles_without_spills(configuration, target, tmp_path):
    kernel = compiled(configuration, target)
    assert kernel.metadata.shared <= SHARED_MEMORY[target]
    assert local_memory(kernel, target, tmp_path) == 0
    if target != "gfx942":
        # Triton was seen to get that wrong on sm_90 (github.com/fla-org/flash-linear-attention/pull/826).
        assert not transposed_products(kernel.asm["ttir"])
    if target != "gfx942" and configuration.kernel.__name__.startswith("mix_"):
        # Activations reach shared memory 16 bytes at a time and asynchronously: the compiler knows they are aligned.
        assert re.search(r"cp\.async\.cg\.shared\.global .*0x10,", kernel.asm["ptx"])


@pytest.mark.parametrize(("operation", "candidate"), CANDIDATES, ids=str)
def test_the_schedules_that_a_gpu_will_try_compile_for_it(operation, candidate, tmp_path):
    configuration = shipped(candidate)
    other = changed(configuration, candidate)
    assert other != configuration
    assert {name for name, _ in other.constants} == {name for name, _ in configuration.constants}
    assert_fits(other, tmp_path)


@pytest.mark.parametrize("schedule", one_program.SCHEDULES, ids=str)
@pytest.mark.parametrize("modulate", [False, True])
def test_the_prototype_compiles_for_a_gpu_that_will_try_it(schedule, modulate, tmp_path):
    own = one_program.configuration(torch.bfloat16, schedule, inner=128, heads=4, modulate=modulate)
    assert_fits(own, tmp_path)


def assert_fits(configuration, folder):
    kernel = compiled(configuration, "sm_90")
    assert kernel.metadata.shared <= 232_448
    assert local_memory(kernel, "sm_90", folder) == 0
    assert not transposed_products(kernel.asm["ttir"])


@pytest.mark.parametrize(
    "configuration",
    [own for own in cross_attention.configurations() if "head_dim" in own.kernel.arg_names],
    ids=name_of,
)
def test_heads_whose_width_16_does_not_divide(configuration, tmp_path):
    """Heads of 24 or 40, say: another specialisation of the same variant, which may spill a little if it is wide."""
    kernel = compiled(configuration, "sm_90", unaligned=("head_dim",))
    assert kernel.metadata.shared <= SHARED_MEMORY["sm_90"]
    assert local_memory(kernel, "sm_90", tmp_path) <= 96


def test_spills_would_be_seen(tmp_path):
    """The check of spills finds them in a tile that no register file holds."""
    configuration = next(own for own in CONFIGURATIONS if own.kernel.__name__ == "query_forward")
    constants = {**dict(configuration.constants), "BLOCK_M": 256, "BLOCK_I": 256}
    configuration = replace(configuration, constants=tuple(constants.items()))
    for target in {"sm_90", "gfx942"} & SUPPORTED.keys():
        assert local_memory(compiled(configuration, target), target, tmp_path) > 0


def test_cpu_tensors_are_refused():
    x, key = torch.zeros(1, 2, 16), torch.zeros(1, 3, 16)
    assert "GPU" in cross_attention.unsupported_reason(x, 16, 1)
    weights = dict.fromkeys(("norm_weight", "norm_bias", "query_weight", "query_bias", "output_weight", "output_bias"))
    with pytest.raises(KernelError, match="GPU"):
        cross_attention.cross_attention(x, key, key, num_heads=1, **weights)
    tensors = (x, key, torch.zeros(2, 2), torch.zeros(2, 3), torch.zeros(2))
    assert "GPU" in token_mixing.unsupported_reason(x, 3)
    with pytest.raises(KernelError, match="GPU"):
        token_mixing.token_mixing(*tensors)
