"""What the faster path of the eager ``linear`` must keep of the plain formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from emma_adapter.alignment.fusion import linear_eager
from emma_adapter.alignment.fusion.layers import add_update
from emma_adapter.alignment.fusion.linear_eager import MixTokens, mix_tokens

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float64: torch.int64}


def plain(x: Tensor, projected: Tensor, image_weight: Tensor, text_weight: Tensor, bias: Tensor) -> Tensor:
    return add_update(x, image_weight @ x + text_weight @ projected + bias[:, None])


@pytest.fixture(params=["looks", "does not look"])
def looking(request, monkeypatch):
    """On a GPU nobody looks at values."""
    if request.param == "does not look":
        monkeypatch.setattr(linear_eager, "may_look", lambda tensor: False)
    return request.param


def make(batch=2, n=5, t=3, d=4, *, dtype=torch.float64) -> list[Tensor]:
    shapes = ((batch, n, d), (batch, t, d), (n, n), (n, t), (n,))
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.usefixtures("looking")
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_value_and_gradients(batch):
    tensors = make(batch)
    dy = torch.randn(batch, 5, 4, dtype=torch.float64)
    found = []
    for function in (MixTokens.apply, plain):
        y = function(*tensors)
        found.append((y.detach(), *torch.autograd.grad(y, tensors, dy)))
    assert all((left - right).abs().sum() <= 1e-11 for left, right in zip(*found, strict=True))


def test_it_can_be_differentiated_twice():
    assert torch.autograd.gradcheck(MixTokens.apply, make())
    assert torch.autograd.gradgradcheck(MixTokens.apply, make())


def test_functional_transforms():
    x, projected, *weights = (tensor.detach() for tensor in make())
    xs, weight = torch.stack([x, -x, 2 * x]), torch.stack([weights[0], weights[0].mT, -weights[0]])
    found = torch.vmap(MixTokens.apply, (0, None, 0, None, None))(xs, projected, weight, *weights[1:])
    expected = torch.stack([plain(x, projected, w, *weights[1:]) for x, w in zip(xs, weight, strict=True)])
    assert (found - expected).abs().max() <= 1e-12
    gradient = torch.func.grad(lambda w: MixTokens.apply(x, projected, w, *weights[1:]).square().sum())(weights[0])
    reference = torch.func.grad(lambda w: plain(x, projected, w, *weights[1:]).square().sum())(weights[0])
    assert (gradient - reference).abs().max() <= 1e-11


@pytest.mark.usefixtures("looking")
def test_values_that_are_not_finite_stay_where_they_are():
    x, *others = make()
    with torch.no_grad():
        x[0, 1, 2], x[1, 0, 0] = float("nan"), float("inf")
    y = MixTokens.apply(x, *others)
    places = ~x.isfinite()
    assert torch.equal(y.isfinite(), ~places)
    weights = torch.autograd.grad(y[~places].sum(), others)
    absent = x.detach().masked_fill(places, 0)
    expected = torch.autograd.grad(plain(absent, *others)[~places].sum(), others)
    assert (y - plain(absent, *others))[~places].abs().max() <= 1e-12
    assert all((left - right).abs().max() <= 1e-12 for left, right in zip(weights, expected, strict=True))


@pytest.mark.usefixtures("looking")
@pytest.mark.parametrize("dtype", BITS, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("sizes", [(5, 3, 4), (65, 33, 48)], ids=str)
def test_zero_weights_of_either_sign_are_the_identity_bit_for_bit(dtype, batch, sizes):
    x, projected, *weights = (tensor.detach() for tensor in make(batch, *sizes, dtype=dtype))
    x[:, ::2] *= -0.0
    for sign in (1, -1):
        y = MixTokens.apply(x, projected, *(sign * torch.zeros_like(weight) for weight in weights))
        assert torch.equal(y.view(BITS[dtype]), x.view(BITS[dtype]))


def test_a_frozen_vision_tower_costs_no_gradient():
    x, *others = make(dtype=torch.float32)
    y = MixTokens.apply(x.detach(), *others)
    with torch.profiler.profile() as profile:
        y.backward(torch.ones_like(y))
    products = sum(event.count for event in profile.key_averages() if event.key in ("aten::bmm", "aten::baddbmm"))
    assert products == 1


def test_without_gradients_nothing_is_prepared_for_them(monkeypatch):
    tensors = make()
    expected = MixTokens.apply(*tensors)
    monkeypatch.setattr(MixTokens, "apply", None)
    with torch.no_grad():
        assert torch.equal(mix_tokens(*tensors), expected)


@torch.no_grad()
def test_derivatives_and_batches_where_gradients_are_off():
    x, *others = (tensor.detach() for tensor in make())
    tangent = torch.randn_like(x)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        found = torch.autograd.forward_ad.unpack_dual(mix_tokens(dual, *others)).tangent
        expected = torch.autograd.forward_ad.unpack_dual(plain(dual, *others)).tangent
    assert (found - expected).abs().max() <= 1e-12
    batched = torch.vmap(lambda own: mix_tokens(own, *others))(torch.stack([x, -x]))
    assert (batched - torch.stack([plain(x, *others), plain(-x, *others)])).abs().max() <= 1e-12


@pytest.mark.parametrize("number", range(5))
def test_forward_mode(number):
    tensors = [tensor.detach() for tensor in make()]
    tangent = torch.randn_like(tensors[number])

    def derivative(function):
        return torch.func.jvp(
            lambda own: function(*tensors[:number], own, *tensors[number + 1 :]), (tensors[number],), (tangent,)
        )[1]

    assert (derivative(mix_tokens) - derivative(plain)).abs().max() <= 1e-12


def test_it_can_be_traced(tmp_path):
    tensors = [tensor.detach().float() for tensor in make()]
    traced = torch.jit.trace(mix_tokens, tensors)
    torch.jit.save(traced, str(tmp_path / "traced.pt"))
    found = torch.jit.load(str(tmp_path / "traced.pt"))(*tensors)
    assert (found - plain(*tensors)).abs().max() <= 1e-6
