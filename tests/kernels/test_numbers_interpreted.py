"""Numbers at the edge of their range in the kernels, on CPU tensors, against the formulas in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from emma_adapter import EmmaAlignment, EmmaConfig, Packing
from tests.kernels.precision import DTYPES, TOLERANCES
from tests.support import tiny
from tests.support.budget import budget
from tests.support.formulas import assert_correct, expected, formula, results, same, same_bits, weighting

pytestmark = pytest.mark.usefixtures("poisoned_memory")

FUSIONS = ["attention", "modulation", "linear"]
D, DT, T, GRID = 16, 12, 4, (2, 3)
N = GRID[0] * GRID[1]
BROKEN = [float("nan"), float("inf"), -float("inf")]

every_fusion = pytest.mark.parametrize("fusion", FUSIONS)
every_dtype = pytest.mark.parametrize("dtype", budget([torch.bfloat16], DTYPES), ids=str)


def make(fusion: str, dtype: torch.dtype = torch.float32, *, trained: bool = True, **changes) -> EmmaAlignment:
    torch.manual_seed(3)
    sizes = {"visual_dim": D, "instruction_dim": DT, "visual_grid": GRID, "max_instruction_tokens": T}
    sizes |= {"inner_dim": 16, "num_heads": 1, **changes}
    alignment = EmmaAlignment(EmmaConfig(fusion=fusion, kernel="triton", **sizes))
    if trained:
        tiny.train_randomly(alignment, scale=0.2)
    return alignment.to(dtype).float()


def tokens(batch: int = 2, visual: int = N, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    v = torch.randn(batch, visual, D, generator=generator)
    return v.to(dtype), torch.randn(batch, T, DT, generator=generator).to(dtype)


@every_dtype
@pytest.mark.parametrize("fusion", ["attention", "modulation"])
def test_attention_scores_far_beyond_the_range_of_float16(fusion, dtype):
    """Queries and keys near its limit, whose products are not; gradients too, the choice being certain."""
    alignment = make(fusion)
    attention = alignment.fusion.cross_attention
    with torch.no_grad():
        attention.query.bias.fill_(30_000)
        attention.key.weight.mul_(3_000)
    alignment = alignment.to(dtype).float()
    v, t = tokens(dtype=dtype)
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 0, 1]]).bool()
    key = torch.nn.functional.layer_norm(t.double(), (DT,)) @ attention.key.weight.double().T
    assert key.abs().max() < 65_504
    assert 30_000 * key.sum(-1).abs().max() / 4 > 1e6
    found, want = results(alignment, v, t, mask), expected(alignment, v, t, mask)
    forward, backward = TOLERANCES[dtype]
    assert (found["y"].double() - want["y"]).abs().max() <= forward * want["y"].abs().max()
    for name, value in found.items():
        assert value.isfinite().all(), name
    for name in ("value.weight", "value.bias", "output.weight", "output.bias"):
        value = want[f"fusion.cross_attention.{name}"]
        assert (found[f"fusion.cross_attention.{name}"] - value).abs().max() <= backward * value.abs().max(), name


@every_dtype
@every_fusion
def test_channels_ten_thousand_times_the_others(fusion, dtype):
    v, t = tokens(dtype=dtype)
    v[..., 3], v[0, 2, 5] = 1e4, -1e4
    # Beside such a channel all others are alike, normalised, and the kernels' products read them in half precision.
    alike = ("visual_norm.weight",) if dtype != torch.float32 else ()
    assert_correct(make(fusion, dtype), v, t, only_finite=alike)


@every_fusion
def test_what_float16_cannot_hold_is_infinite_as_in_any_sum(fusion):
    alignment = make(fusion, trained=False)
    with torch.no_grad():
        if fusion == "linear":
            alignment.fusion.bias.copy_(torch.linspace(-2, 2, N).round() * 4_096)
        else:
            bias = torch.linspace(-2, 2, D).round() * (4_096 if fusion == "attention" else 1)
            alignment.fusion.cross_attention.output.bias.copy_(bias)
    v, t = tokens(dtype=torch.float16)
    v[..., ::5] = 64_992
    want, found = expected(alignment, v, t)["y"], alignment(v, t)
    beyond = want.abs() >= 65_520
    assert beyond.any()
    assert torch.equal(found.isinf(), beyond)
    assert (found[~beyond].double() - want[~beyond]).abs().max() <= 2e-3 * want[~beyond].abs().max()


@every_dtype
@every_fusion
def test_values_that_are_not_finite_stay_where_they_are(fusion, dtype):
    """They are returned as they are. For every other value and every weight's gradient they might as well not be there:
    a whole token for ``attention`` and ``modulation``, one channel of it for ``linear``."""
    alignment = make(fusion, dtype)
    v, t = tokens(3, dtype=dtype)
    mask = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1], [1, 0, 0, 0]]).bool()
    broken, absent = v.clone(), v.clone()
    places = torch.zeros(v.shape, dtype=torch.bool)
    for value, place in zip(BROKEN, ((0, 2, 5), (0, 5, 15), (2, 0, 0)), strict=True):
        broken[place], places[place] = value, True
    untouched = places if fusion == "linear" else places.any(-1, keepdim=True).expand_as(places)
    absent[untouched] = 0
    found, without = results(alignment, broken, t, mask), results(alignment, absent, t, mask)
    assert same(found["y"][untouched], broken[untouched])
    assert same_bits(found["y"][~untouched], without["y"][~untouched])
    for name, gradient in found.items():
        assert name == "y" or gradient.isfinite().all(), name
    if fusion == "linear":
        names = [name for name in found if name.startswith("fusion.")]
        assert all(torch.equal(found[name], without[name]) for name in names)
    else:
        assert torch.equal(found["v"][untouched], weighting(v)[untouched])
        eager = EmmaAlignment(alignment.config.replace(kernel="eager"))
        eager.load_state_dict(alignment.state_dict())
        want = results(eager.double(), broken.double(), t.double(), mask)
        for name, value in want.items():
            if name not in ("y", "v"):
                assert (found[name].double() - value).abs().max() <= 5e-2 * value.abs().max(), name


@every_dtype
@every_fusion
def test_untrained_is_the_identity_for_what_is_not_finite(fusion, dtype):
    alignment = make(fusion, dtype, trained=False)
    v, t = tokens(3, dtype=dtype)
    v[0, 2, 5], v[0, 3], v[2, 0, 0], v[1, 1] = BROKEN[0], BROKEN[1], BROKEN[2], -0.0
    assert same(alignment(v, t), v)
    if fusion != "linear":
        assert same(
            alignment(v.flatten(0, 1), t, packing=Packing([(3, 2), GRID, GRID], torch.tensor([2, 0, 0]))),
            v.flatten(0, 1),
        )


@every_fusion
def test_a_broken_instruction_breaks_its_own_rows(fusion):
    alignment = make(fusion)
    v, t = tokens(3)
    mask = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1], [1, 0, 0, 0]]).bool()
    clean = alignment(v, t, mask)
    t[0, 2, 1] = t[2, 3, 0] = float("inf")
    assert same_bits(alignment(v, t, mask), clean)
    t[1, 2, 1] = float("nan")
    found = alignment(v, t, mask)
    assert same_bits(found[[0, 2]], clean[[0, 2]])
    assert not found[1].isfinite().any()


@every_fusion
def test_a_weight_that_float16_cannot_hold_shows(fusion):
    alignment = make(fusion)
    weight = "image_weight" if fusion == "linear" else "cross_attention.value.weight"
    v, t = tokens(dtype=torch.float16)
    with torch.no_grad():
        alignment.fusion.get_parameter(weight)[0] = 1e5
        found = alignment(v, t)
    assert not (found[:, 0] if fusion == "linear" else found).isfinite().any()


@every_fusion
def test_images_of_one_token(fusion):
    assert_correct(make(fusion, visual_grid=(1, 1)), *tokens(visual=1))


def test_sixty_four_images_of_different_sizes():
    alignment = make("attention")
    grids = [(1 + index % 3, 1 + index * 7 % 4) for index in range(64)]
    rows = torch.arange(64) * 5 % 3
    _, t = tokens(3)
    flat = tokens(1, sum(height * width for height, width in grids))[0][0]
    with torch.no_grad():
        found = alignment(flat, t, packing=Packing(grids, rows))
    pieces = zip(flat.split([height * width for height, width in grids]), grids, rows, strict=True)
    p = {name: value.detach().double() for name, value in alignment.named_parameters()}
    want = [formula(alignment.config, p, x[None].double(), t[row][None].double(), None, g)[0] for x, g, row in pieces]
    assert (found - torch.cat(want)).abs().max() <= 1e-5 * torch.cat(want).abs().max()
