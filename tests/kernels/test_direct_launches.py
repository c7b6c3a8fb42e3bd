"""A kernel that was launched before is launched without Triton's look-up: with what Triton itself would pass.

There is no GPU: Triton compiles for one, and a driver that only notes what it is given takes the place of CUDA's.
"""

# ruff: noqa: N803 (sizes are upper-case in Triton code)

from __future__ import annotations

import gc

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import LazyDict, make_backend  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import create_function_from_signature  # noqa: E402

from emma_adapter.kernels.launch import Configuration, specialisation  # noqa: E402

CPU = torch.device("cpu")


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["other_ptr"])
def scaled(x_ptr, other_ptr, y_ptr, count, width, factor, BLOCK: tl.constexpr, NEGATE: tl.constexpr):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + places, mask=places < count, other=0.0) + tl.load(other_ptr + places % width)
    tl.store(y_ptr + places, -x * factor if NEGATE else x * factor, mask=places < count)


class NotingDriver:
    """What a launch asks of CUDA's driver. ``launches`` has what would have been launched, and how."""

    def __init__(self) -> None:
        self.launches: list[tuple] = []
        self.loaded = 0
        self.device = 0
        self.utils = self

    def launcher_cls(self, source, metadata):
        return lambda *given: self.launches.append(given)

    def load_binary(self, name, binary, shared, device):
        self.loaded += 1
        return f"module {self.loaded}", f"function {self.loaded}", 32, 0, 1024

    def unload_module(self, module):
        pass

    def get_device_properties(self, device):
        return {"max_shared_mem": 232_448, "multiprocessor_count": 132, "max_num_regs": 65_536, "warpSize": 32}

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return f"stream of {device}"

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def noting(monkeypatch):
    noting = NotingDriver()
    # Not set_active: without a GPU there is none to put back.
    monkeypatch.setattr(driver, "_active", noting)
    scaled.device_caches.clear()
    yield noting
    # What is compiled is unloaded by the driver that loaded it.
    scaled.device_caches.clear()
    gc.collect()


def configuration(**changes) -> Configuration:
    constants = {"BLOCK": 64, "NEGATE": True, **changes}
    return Configuration(scaled, torch.float32, (), tuple(constants.items()), num_warps=4, num_stages=1)


def arguments(*, dtype=torch.float32, shift=0, count=100, width=32, factor=0.5) -> dict:
    x = torch.zeros(129 + shift, dtype=dtype)[shift:]
    return {"x_ptr": x, "other_ptr": x, "y_ptr": torch.zeros(128), "count": count, "width": width, "factor": factor}


KINDS = (
    arguments(),
    arguments(shift=1),
    arguments(dtype=torch.float16),
    arguments(count=96),
    arguments(width=1),
    arguments(width=33),
    arguments(width=2**31),
    arguments(count=1, factor=1.0),
)


@pytest.mark.parametrize("grid", [(2,), (2, 3), (2, 3, 4)], ids=str)
def test_it_passes_what_triton_would_pass(noting, grid, monkeypatch):
    own = configuration()
    bound = []
    monkeypatch.setattr(
        Configuration,
        "_bind_and_launch",
        lambda self, *given, launch=Configuration._bind_and_launch: (bound.append(self), launch(self, *given))[1],
    )
    for kind in KINDS:
        own.launch(grid, CPU, **kind)
    bound.clear()
    noting.launches.clear()
    for kind in KINDS:
        own.launch(grid, CPU, **kind)
    direct = list(noting.launches)
    assert not bound
    noting.launches.clear()
    for kind in KINDS:
        scaled[grid](**kind, **dict(own.constants), **own.options())
    assert len(direct) == len(noting.launches) == len(KINDS)
    for found, expected in zip(direct, noting.launches, strict=True):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert type(one) is type(other)
            if isinstance(one, torch.Tensor):
                assert one is other
            elif isinstance(one, LazyDict):  # What hooks are told.
                assert one.get() == other.get()
            else:
                assert one == other
    # As many kernels as Triton compiled for these, and each again.
    assert len({launch[4] for launch in direct}) == noting.loaded > 4


def test_variants_and_devices_are_kept_apart(noting):
    kind = arguments()
    one, other = configuration(), configuration(NEGATE=False)
    for own in (one, other, one, other):
        own.launch((2,), CPU, **kind)
    first, second = (launch[4] for launch in noting.launches[:2])
    assert first != second
    assert [launch[4] for launch in noting.launches] == [first, second, first, second]
    noting.device = 1
    elsewhere = torch.device("meta", 1)  # Any other one: only its number counts.
    one.launch((2,), elsewhere, **kind)
    one.launch((2,), elsewhere, **kind)
    third, again = (launch[4] for launch in noting.launches[-2:])
    assert third == again not in (first, second)
    assert noting.launches[-1][3] == "stream of 1"


numbers = st.one_of(st.integers(-40, 40), st.sampled_from([2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**62, 2**63]))


@settings(max_examples=300)
@given(
    pairs=st.lists(st.tuples(numbers, numbers, st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=2),
    dtypes=st.tuples(*[st.sampled_from([torch.float32, torch.float16, torch.uint8])] * 2),
)
def test_what_triton_tells_apart_is_told_apart(pairs, dtypes):
    """Two launches that look alike here are bound by Triton to the same types and specialisations."""
    backend = make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(scaled.signature, scaled.params, backend)
    keys, bound = [], []
    for (count, width, shift, other_shift), dtype in zip(pairs, dtypes, strict=True):
        given_here = {
            "x_ptr": torch.zeros(64, dtype=dtype)[shift:],
            "other_ptr": torch.zeros(64)[other_shift:],
            "y_ptr": torch.zeros(64),
            "count": count,
            "width": width,
            "factor": 0.5,
        }
        keys.append([specialisation(value) for value in given_here.values()])
        bound.append(bind(**given_here, BLOCK=64, NEGATE=True, num_warps=4)[1])
    assert keys[0] != keys[1] or bound[0] == bound[1]
