"""What the host hands to the kernels, without a GPU: Triton's own binder takes the place of a launch.

The interpreter takes arguments that a launch would refuse, and compilation knows only what it is told.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import make_backend  # noqa: E402
from triton.runtime.jit import create_function_from_signature  # noqa: E402

from emma_adapter import EmmaAlignment, EmmaConfig  # noqa: E402
from emma_adapter.alignment.fusion import dispatch  # noqa: E402
from emma_adapter.kernels import cross_attention, token_mixing  # noqa: E402
from emma_adapter.kernels import launch as launching  # noqa: E402
from emma_adapter.kernels.cross_attention.instruction import instruction_forward  # noqa: E402
from emma_adapter.kernels.launch import Configuration  # noqa: E402
from emma_adapter.kernels.token_mixing import tiles  # noqa: E402
from emma_adapter.kernels.token_mixing.tiles import splits_for  # noqa: E402
from tests.kernels.precision import DTYPES  # noqa: E402

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture
def launched(monkeypatch):
    """The configurations that would have been launched; their outputs are never written."""
    backend = make_backend(GPUTarget("cuda", 90, 32))
    known = {*cross_attention.configurations(), *token_mixing.configurations()}
    found: list[Configuration] = []

    def launch(self: Configuration, grid, device, **arguments) -> None:
        kernel = self.kernel
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        given = {**arguments, **dict(self.constants), **self.options(), "debug": False}
        bound, specialisation, options = bind(**given)
        _, signature, _, attributes = kernel._pack_args(backend, given, bound, specialisation, options)
        name = kernel.__name__
        assert signature == self.signature(), name
        assert self in known, name
        # Launched again, it passes values and then constants.
        assert kernel.arg_names == [*self._passed, *(own for own in kernel.arg_names if own in dict(self.constants))]
        divisible = {kernel.arg_names[index[0]] for index, value in attributes.items() if value}
        declared = {kernel.arg_names[index] for index in self.divisible_by_16()}
        assert divisible <= declared, name
        # Whatever was handed in, pointers are aligned; heads and instruction tokens may be of any width.
        assert declared - divisible <= {"head_dim", "E"}, name
        assert all(side <= 65_535 for side in grid[1:]), name
        found.append(self)

    monkeypatch.setattr(Configuration, "launch", launch)
    monkeypatch.setattr(launching, "device_problem", lambda device: None)
    return found


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """At an address that 16 doesn't divide."""
    numbers = torch.randn(torch.Size(shape).numel() + 1, dtype=dtype)
    return numbers[1:].view(shape).detach().requires_grad_()


def attend(x: Tensor, heads: int, head_dim: int, keys: Tensor, **options) -> None:
    width, inner = x.shape[-1], heads * head_dim
    cross_attention.cross_attention(
        x,
        keys,
        leaf(*keys.shape),
        num_heads=heads,
        norm_weight=leaf(width),
        norm_bias=leaf(width),
        query_weight=leaf(inner, width),
        query_bias=leaf(inner),
        output_weight=leaf(width, inner),
        output_bias=leaf(width),
        **options,
    ).sum().backward()


@every_dtype
@pytest.mark.parametrize("epilogue", ["add", "modulate"])
def test_cross_attention(launched, dtype, epilogue):
    for heads, head_dim in ((1, 16), (2, 24), (4, 32), (8, 64), (16, 17)):
        inner = heads * head_dim
        attend(
            leaf(3, 5, 48, dtype=dtype), heads, head_dim, leaf(3, 7, inner), position=leaf(5, inner), epilogue=epilogue
        )
        attend(leaf(1, 1, 16, dtype=dtype), heads, head_dim, leaf(1, 1, inner), epilogue=epilogue)
        attend(
            leaf(21, 64, dtype=dtype),
            heads,
            head_dim,
            leaf(2, 16, inner),
            position=leaf(9, inner),
            position_start=torch.tensor([0, 0, 1]),
            cu_seqlens=torch.tensor([0, 5, 5, 21]),
            instruction_rows=torch.tensor([0, 1, 1]),
            epilogue=epilogue,
        )
    kernels = {configuration.kernel for configuration in cross_attention.configurations()}
    assert {configuration.kernel for configuration in launched} == kernels - {instruction_forward}


@every_dtype
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
def test_keys_and_values(launched, dtype, weight_dtype):
    for rows, length, width, inner in ((2, 7, 48, 32), (1, 1, 16, 16), (3, 77, 20, 80)):
        weights = {
            "norm_weight": (width,),
            "norm_bias": (width,),
            "key_weight": (inner, width),
            "value_weight": (inner, width),
            "value_bias": (inner,),
            "query_weight": (inner, 48),
            "output_weight": (48, inner),
        }
        leaves = {name: leaf(*shape, dtype=weight_dtype) for name, shape in weights.items()}
        mask = torch.ones(rows, length + 1, dtype=torch.bool)[:, 1:]
        for own in (mask, None):
            key, value, _ = cross_attention.keys_and_values(leaf(rows, length, width, dtype=dtype), own, **leaves)
            assert key.shape == value.shape == (rows, length, inner)
    assert len(launched) == 6


@pytest.mark.parametrize("fusion", ["attention", "modulation"])
def test_a_forward_in_half_precision_runs_four_kernels_and_nothing_else(launched, monkeypatch, fusion):
    """No cast, fill or product beside them, with weights in float32 and a mask."""
    monkeypatch.setattr(dispatch, "_INTERPRETED", True)
    sizes = {"visual_dim": 64, "instruction_dim": 48, "visual_grid": (3, 4)}
    alignment = EmmaAlignment(EmmaConfig(fusion=fusion, kernel="triton", **sizes))
    v, t = torch.randn(2, 12, 64).bfloat16(), torch.randn(2, 9, 48).bfloat16()
    mask = torch.arange(9) < torch.tensor([[4], [0]])
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        alignment(v, t, mask)
    assert [configuration.kernel.__name__ for configuration in launched] == [
        *("instruction_forward", "query_forward", "attention_forward", "output_forward")
    ]
    ran = {event.key.removeprefix("aten::") for event in profile.key_averages() if event.key.startswith("aten::")}
    # What makes no kernel: memory, and other views of it. A cast would be `_to_copy` beside `to`.
    views = {"to", "view", "reshape", "detach", "unbind", "select", "as_strided", "alias"}
    assert ran <= views | {"empty", "new_empty", "empty_like", "empty_strided"}


@pytest.mark.parametrize(("num_chunks", "blocks"), [(1024, 30), (18, 48), (1024, 300), (3, 1), (4608, 110)])
def test_a_sum_is_split_into_what_runs_at_once(num_chunks, blocks):
    splits, chunks = splits_for(num_chunks, blocks)
    assert (splits - 1) * chunks < num_chunks <= splits * chunks
    assert splits == 1 or splits * blocks <= tiles._MANY_PROGRAMS


@every_dtype
def test_token_mixing(launched, dtype):
    for batch, n, t, width in ((1, 1, 1, 16), (2, 37, 16, 48), (64, 576, 77, 64), (2, 729, 77, 1152)):
        text_weight = leaf(n, t + 1)[:, :t]
        token_mixing.token_mixing(
            leaf(batch, n, width, dtype=dtype), leaf(batch, t, width, dtype=dtype), leaf(n, n), text_weight, leaf(n)
        ).sum().backward()
    expected = {own for own in token_mixing.configurations() if own.dtype == dtype}
    assert {own for own in launched if own.dtype == dtype} >= expected
