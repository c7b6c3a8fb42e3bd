"""The kernels of token mixing on CPU tensors, against the formula in float64 and against the eager fusion."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from emma_adapter import KernelError, ShapeError
from emma_adapter.kernels.launch import Configuration
from emma_adapter.kernels.token_mixing import (
    backward,
    forward,
    tiles,
    token_mixing,
    token_mixing_reference,
    unsupported_reason,
)
from emma_adapter.kernels.token_mixing.op import _token_mixing, _token_mixing_backward
from tests.kernels.precision import BITS, DTYPES, TOLERANCES
from tests.support.budget import budget

pytestmark = pytest.mark.usefixtures("poisoned_memory")

NAMES = ("x", "projected", "image_weight", "text_weight", "bias")

every_dtype = pytest.mark.parametrize("dtype", budget([torch.bfloat16], DTYPES), ids=str)


@pytest.fixture
def small_tiles(monkeypatch):
    """So that small problems, which the interpreter needs, have several tiles in every direction."""
    monkeypatch.setattr(tiles, "_BLOCKS", {"large": (32, 32, 16, 4, 2), "small": (16, 32, 16, 4, 2)})
    monkeypatch.setattr(tiles, "_BLOCKS_FLOAT32", (16, 32, 16, 4, 2))
    monkeypatch.setattr(tiles, "PADDING", 32)
    monkeypatch.setattr(tiles, "_MAX_SPLITS", 3)
    # Packing and adding have tiles of their own, which must divide PADDING.
    for file in (tiles, forward, backward):
        monkeypatch.setattr(file, "BLOCKS_ELEMENTWISE", (("BLOCK_M", 32), ("BLOCK_N", 32), ("PADDING", 32)))
    made_from_them = tiles.product, forward._packing, backward._adding
    for cached in made_from_them:
        cached.cache_clear()
    yield
    for cached in made_from_them:
        cached.cache_clear()


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that run, with what they are given."""
    found = []
    launch = Configuration.launch

    def spy(self, grid, device, **arguments):
        found.append((self.kernel.fn.__name__, arguments))
        launch(self, grid, device, **arguments)

    monkeypatch.setattr(Configuration, "launch", spy)
    return found


def make(batch=2, n=7, t=5, d=16, *, dtype=torch.float32, seed=0) -> list[Tensor]:
    """Values that ``dtype`` holds exactly, so that all that is computed from them starts from the same numbers."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(dtype).float()

    tensors = [normal(batch, n, d), normal(batch, t, d), normal(n, n, scale=n**-0.5), normal(n, t, scale=t**-0.5)]
    return [*(tensor.to(dtype) for tensor in tensors[:2]), *tensors[2:], normal(n)]


def run(function, tensors: list[Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The result and all gradients, for a fixed gradient of the result."""
    leaves = [tensor.detach().to(dtype or tensor.dtype).requires_grad_() for tensor in tensors]
    y = function(*leaves)
    # As large in the middle as at the ends, and exact in every dtype.
    dy = torch.randint(-8, 9, y.shape, generator=torch.Generator().manual_seed(1)) / 8
    y.backward(dy.to(y.dtype))
    assert all(leaf.grad.shape == leaf.shape and leaf.grad.dtype == leaf.dtype for leaf in leaves)
    return {"y": y.detach(), **{name: leaf.grad for name, leaf in zip(NAMES, leaves, strict=True)}}


def error(found: Tensor, expected: Tensor) -> float:
    """Relative to the largest value."""
    if expected.numel() == 0:
        return 0.0
    return ((found.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()


def assert_correct(tensors: list[Tensor]) -> None:
    dtype = tensors[0].dtype
    found, expected = run(token_mixing, tensors), run(token_mixing_reference, tensors, torch.float64)
    eager = run(token_mixing_reference, tensors, dtype)
    assert found["y"].dtype == dtype
    assert found["y"].is_contiguous()
    for name, value in found.items():
        forward, gradient = TOLERANCES[dtype]
        allowed = forward if name == "y" else gradient
        off = error(value, expected[name])
        assert off <= allowed, (name, off)
        if dtype != torch.float32:
            # And no worse than PyTorch in that dtype, by more than a factor of two and a rounding.
            assert off <= 2 * error(eager[name], expected[name]) + torch.finfo(dtype).eps, (name, off)


def same_bits(left: Tensor, right: Tensor) -> bool:
    bits = BITS[left.dtype]
    return left.shape == right.shape and torch.equal(left.contiguous().view(bits), right.contiguous().view(bits))


@every_dtype
def test_formula_with_the_tiles_of_a_gpu(dtype):
    assert_correct(make(2, 7, 5, 16, dtype=dtype))


@pytest.mark.parametrize("dtype", budget([torch.bfloat16], [torch.float32, torch.bfloat16]), ids=str)
def test_formula_over_several_tiles_of_a_gpu(dtype):
    assert_correct(make(1, 130, 77, 144, dtype=dtype))


@every_dtype
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    "sizes",
    [(1, 1, 1, 16), (2, 37, 35, 48), (3, 32, 32, 32), (1, 33, 1, 80), (1, 5, 128, 16)],
    ids=lambda sizes: "x".join(map(str, sizes)),
)
def test_formula_over_several_tiles(sizes, dtype):
    assert_correct(make(*sizes, dtype=dtype))


@pytest.mark.usefixtures("small_tiles")
@settings(max_examples=budget(3, 6), suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.sampled_from(DTYPES), st.integers(0, 3), st.integers(1, 40), st.integers(1, 36), st.integers(1, 3), st.integers()
)
def test_formula_of_any_shape(dtype, batch, n, t, sixteens, seed):
    assert_correct(make(batch, n, t, 16 * sixteens, dtype=dtype, seed=abs(seed) % 1000))


@every_dtype
@pytest.mark.usefixtures("small_tiles")
def test_large_blocks(dtype, monkeypatch):
    monkeypatch.setattr(tiles, "_MANY_PROGRAMS", 1)
    assert_correct(make(2, 37, 35, 48, dtype=dtype))


@every_dtype
def test_zero_weights_are_the_identity_bit_for_bit(dtype):
    x, projected, *weights = make(2, 5, 3, 16, dtype=dtype)
    x[0, 0], x[1, 1], x[0, 1, 0] = -0.0, 0.0, torch.finfo(dtype).tiny
    found = run(token_mixing, [x, projected, *(torch.zeros_like(weight) for weight in weights)])
    assert same_bits(found["y"], x)
    # Of zeros of the other sign, too.
    assert same_bits(token_mixing(x, projected, *(-torch.zeros_like(weight) for weight in weights)), x)


@pytest.mark.usefixtures("small_tiles")
def test_the_same_bits_every_time():
    tensors = make(3, 17, 5, 32)
    first, second = run(token_mixing, tensors), run(token_mixing, tensors)
    assert all(same_bits(first[name], second[name]) for name in first)


@pytest.mark.usefixtures("small_tiles")
def test_what_other_images_hold_does_not_matter():
    """Rows past an image's last are those of the next one."""
    x, projected, *weights = make(2, 5, 3, 16)
    clean = token_mixing(x, projected, *weights)
    x[1], projected[1] = float("inf"), float("inf")
    assert same_bits(token_mixing(x, projected, *weights)[0], clean[0])


@pytest.mark.usefixtures("small_tiles")
def test_inputs_need_not_be_contiguous_or_aligned():
    tensors = make(2, 6, 5, 16)
    expected = run(token_mixing, tensors)

    def strided(*leaves: Tensor) -> Tensor:
        shifted = [leaf.mT.contiguous().mT if leaf.ndim > 1 else leaf.repeat_interleave(2)[::2] for leaf in leaves]
        unaligned = torch.cat([torch.zeros(1), leaves[0].flatten()])[1:].view(leaves[0].shape)
        assert unaligned.data_ptr() % 16
        assert not shifted[1].is_contiguous()
        return token_mixing(unaligned, *shifted[1:])

    found = run(strided, tensors)
    assert all(same_bits(found[name], expected[name]) for name in found)


def test_gradients_of_any_strides():
    tensors = [tensor.requires_grad_() for tensor in make()]
    token_mixing(*tensors).sum().backward()
    assert (tensors[4].grad - 2 * 16).abs().max() <= 1e-5


def test_no_gradient_is_computed_that_nobody_asked_for(launched):
    x, projected, *weights = make()
    expected = run(token_mixing, [x, projected, *weights])
    launched.clear()

    def kernels(*needed: Tensor) -> list[str]:
        launched.clear()
        for tensor in (x, projected, *weights):
            tensor.requires_grad_(any(tensor is other for other in needed)).grad = None
        y = token_mixing(x, projected, *weights)
        dy = torch.randint(-8, 9, y.shape, generator=torch.Generator().manual_seed(1)) / 8
        y.backward(dy)
        assert all((tensor.grad is not None) == tensor.requires_grad for tensor in (x, projected, *weights))
        return [name for name, _ in launched]

    forward = ["pack_weights", "mix_forward"]
    # A frozen vision tower: the blocks of x are left out, and dx is not even allocated.
    frozen = [*forward, "pack_weights", "mix_backward_inputs", "mix_backward_weights", "add_splits"]
    assert kernels(projected, *weights) == frozen
    inputs = next(arguments for name, arguments in launched if name == "mix_backward_inputs")
    assert inputs["first_block"] > 0
    assert inputs["dx_ptr"] is inputs["dy_ptr"]
    assert same_bits(projected.grad, expected["projected"])
    assert kernels(x) == [*forward, "pack_weights", "mix_backward_inputs"]
    assert same_bits(x.grad, expected["x"])
    assert kernels(*weights) == [*forward, "mix_backward_weights", "add_splits"]


@every_dtype
def test_a_batch_of_no_images(dtype, launched):
    found = run(token_mixing, make(0, 3, 2, 16, dtype=dtype))
    assert found["y"].shape == (0, 3, 16)
    assert all(found[name].eq(0).all() for name in NAMES)
    assert launched == []


def test_half_precision_weights():
    x, projected, *weights = make(dtype=torch.bfloat16)
    found = run(token_mixing, [x, projected, *(weight.bfloat16() for weight in weights)])
    expected = run(token_mixing, [x, projected, *weights])
    assert same_bits(found["y"], expected["y"])
    assert all(found[name].dtype == torch.bfloat16 for name in NAMES)


def test_the_operators_pass_pytorchs_own_checks():
    tensors = make(2, 3, 2, 16)
    torch.library.opcheck(_token_mixing, [tensor.clone().requires_grad_() for tensor in tensors])
    for needed in ((True, True, True), (False, True, True), (True, False, False)):
        torch.library.opcheck(_token_mixing_backward, (torch.randn_like(tensors[0]), *tensors[:4], *needed))


def test_compiles_without_graph_breaks():
    tensors = make(2, 3, 2, 16)
    expected = run(token_mixing, tensors)
    found = run(torch.compile(token_mixing, fullgraph=True, backend="aot_eager", dynamic=True), tensors)
    assert all(same_bits(found[name], expected[name]) for name in found)


X, P, W, U, B = make(2, 3, 2, 16)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ((X[0], P, W, U, B), r"\[B, N, D\]"),
        ((X, P[:1], W, U, B), "should be"),
        ((X, P, W[:2], U, B), "should be"),
        ((X, P, W, U, B[:2]), "should be"),
        ((X.half(), P, W, U, B), "float16 and torch.float32"),
    ],
)
def test_misfits_are_shape_errors(tensors, message):
    with pytest.raises(ShapeError, match=message):
        token_mixing(*tensors)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ((X.double(), P.double(), W, U, B), "float64"),
        ((X[..., :8], P[..., :8], W, U, B), "multiple of 16"),
        ((X[:, :0], P, W[:0, :0], U[:0], B[:0]), "at least one visual token"),
        ((X, P[:, :0], W, U[:, :0], B), "instruction tokens"),
        ((X, P.repeat(1, 65, 1), W, U.repeat(1, 65), B), "1 to 128"),
    ],
)
def test_what_the_kernels_cannot_compute(tensors, message):
    assert unsupported_reason(X, P.shape[1]) is None
    with pytest.raises(KernelError, match=message):
        token_mixing(*tensors)
