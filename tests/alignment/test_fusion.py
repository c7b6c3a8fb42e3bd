from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from emma_adapter import ConfigError, EmmaAlignment, EmmaConfig, Fusion, Packing, ShapeError, register_fusion
from emma_adapter.alignment.fusion import fusion_class, fusion_names, resampling
from emma_adapter.alignment.fusion.resampling import resample
from tests.support import tiny
from tests.support.budget import budget, some

B, GRID, D, T, DT = 3, (2, 3), 8, 5, 6
N = GRID[0] * GRID[1]

VARIANTS = {
    "linear": {"fusion": "linear"},
    "linear-rank": {"fusion": "linear", "rank": 2},
    "attention": {"fusion": "attention"},
    "attention-blind": {"fusion": "attention", "num_visual_tokens": None, "visual_grid": None},
    "modulation": {"fusion": "modulation"},
    "modulation-blind": {"fusion": "modulation", "num_visual_tokens": None, "visual_grid": None},
}
LINEAR = ["linear", "linear-rank"]
BLIND = ["attention-blind", "modulation-blind"]
POSITIONAL = ["attention", "modulation"]
CROSS = POSITIONAL + BLIND
GRIDDED = POSITIONAL + LINEAR
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float64: torch.int64}
HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Attention over a handful of tokens is thirty times slower on two threads than on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


every_variant = pytest.mark.parametrize("variant", list(VARIANTS))


def make(variant: str, *, trained: bool = False, dtype: torch.dtype | None = None, **changes) -> EmmaAlignment:
    sizes = {
        "visual_dim": D,
        "instruction_dim": DT,
        "num_visual_tokens": N,
        "visual_grid": GRID,
        "max_instruction_tokens": T,
        "inner_dim": 8,
        "num_heads": 2,
    }
    alignment = EmmaAlignment(EmmaConfig(**{**sizes, **VARIANTS[variant], **changes}))
    if trained:
        tiny.train_randomly(alignment)
    return alignment if dtype is None else alignment.to(dtype)


def tokens(batch: int = B, visual: int = N, instruction: int = T, *, dtype: torch.dtype = torch.float32, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(batch, visual, D, generator=generator, dtype=torch.float64)
    t = torch.randn(batch, instruction, DT, generator=generator, dtype=torch.float64)
    return v.to(dtype), t.to(dtype)


def ragged_mask(batch: int = B, length: int = T) -> Tensor:
    """Rows of different lengths, padded on different sides; each has at least two valid tokens."""
    mask = torch.ones(batch, length, dtype=torch.bool)
    for row in range(batch):
        cut = row % (length - 1)
        mask[row, length - cut :] = False
        if row % 2:
            mask[row] = mask[row].flip(0)
    return mask


def same_bits(left: Tensor, right: Tensor) -> bool:
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    return torch.equal(left.contiguous().view(BITS[left.dtype]), right.contiguous().view(BITS[right.dtype]))


def assert_identity(alignment: EmmaAlignment, v: Tensor, t: Tensor, mask: Tensor | None = None, **kwargs) -> None:
    out = alignment(v, t, mask, **kwargs)
    assert out.dtype == v.dtype
    assert torch.equal(out, v)
    assert same_bits(out, v)


# --- identity at initialisation -------------------------------------------------------------------------------


@st.composite
def problems(draw):
    """A fresh alignment of any size with inputs that fit it."""
    variant = draw(st.sampled_from(list(VARIANTS)))
    grid = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    batch, dim, dim_t, columns = (draw(st.integers(1, high)) for high in (3, 24, 24, 9))
    heads = draw(st.integers(1, 3))
    n = grid[0] * grid[1]
    changes = dict(VARIANTS[variant])
    if "rank" in changes:
        changes["rank"] = draw(st.integers(1, n))
    config = EmmaConfig(
        **{
            "visual_dim": dim,
            "instruction_dim": dim_t,
            "visual_grid": grid,
            "max_instruction_tokens": columns,
            "inner_dim": heads * draw(st.integers(1, 8)),
            "num_heads": heads,
            **changes,
        }
    )
    torch.manual_seed(draw(st.integers(0, 1000)))
    length = draw(st.integers(1, columns))
    scale = draw(st.sampled_from([1e-3, 1.0, 50.0]))
    mask = None
    if draw(st.booleans()):
        mask = torch.tensor(draw(st.lists(st.booleans(), min_size=batch * length, max_size=batch * length)))
        mask = mask.view(batch, length)
    return EmmaAlignment(config), torch.randn(batch, n, dim) * scale, torch.randn(batch, length, dim_t) * scale, mask


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@settings(max_examples=budget(15, 40))
@given(problem=problems())
def test_identity_until_trained(dtype, autocast, problem):
    alignment, v, t, mask = problem
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert_identity(alignment, v.to(dtype), t.to(dtype), mask)


@every_variant
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_identity_with_half_precision_weights(variant, dtype):
    assert_identity(make(variant, dtype=dtype), *tokens(dtype=dtype), ragged_mask())


@pytest.mark.parametrize("variant", GRIDDED)
@pytest.mark.parametrize("grid", [(2, 3), (3, 2), (1, 7), (5, 5)])
def test_identity_on_any_grid(variant, grid):
    assert_identity(make(variant), *tokens(visual=grid[0] * grid[1]), ragged_mask(), grid=grid)


@every_variant
def test_not_the_identity_once_trained(variant):
    v, t = tokens()
    alignment = make(variant, trained=True)
    assert (alignment(v, t) - v).abs().max() > 0.1
    assert (alignment(v, t) - alignment(v, t.flip(-1))).abs().max() > 0.1


# --- the formulas, written naively in float64 -----------------------------------------------------------------


def layer_norm(row: list[float], weight: Tensor, bias: Tensor) -> Tensor:
    x = torch.tensor(row, dtype=torch.float64)
    mean = x.sum() / len(row)
    variance = ((x - mean) ** 2).sum() / len(row)
    return (x - mean) / torch.sqrt(variance + 1e-5) * weight + bias


def bilinear(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Cell centres of the new grid laid over the old one, clamped at the border."""

    def corners(index: int, size: int, source: int) -> tuple[int, int, float]:
        place = min(max((index + 0.5) * source / size - 0.5, 0.0), source - 1.0)
        low = int(place)
        return low, min(low + 1, source - 1), place - low

    rows = []
    for i, j in itertools.product(range(new[0]), range(new[1])):
        top, bottom, down = corners(i, new[0], old[0])
        left, right, across = corners(j, new[1], old[1])
        upper = table[top * old[1] + left] * (1 - across) + table[top * old[1] + right] * across
        lower = table[bottom * old[1] + left] * (1 - across) + table[bottom * old[1] + right] * across
        rows.append(upper * (1 - down) + lower * down)
    return torch.stack(rows)


def averaging(old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """``[new, old]``: PyTorch's antialiased interpolation, as a matrix."""
    pixels = torch.eye(old[0] * old[1], dtype=torch.float64).unflatten(0, old).permute(2, 0, 1)[None]
    resized = F.interpolate(pixels, size=new, mode="bilinear", antialias=True)
    return resized[0].flatten(1).T


def naive_cross_attention(p: dict[str, Tensor], v: Tensor, t: Tensor, valid: Tensor, *, heads: int, grid) -> Tensor:
    inner = p["query.weight"].shape[0]
    width = inner // heads
    position = p.get("position", torch.zeros(v.shape[1], inner, dtype=torch.float64))
    if "position" in p and grid is not None:
        position = bilinear(position, GRID, grid)
    update = torch.zeros_like(v)
    for b in range(v.shape[0]):
        keys, values = [], []
        for j in range(t.shape[1]):
            normed = layer_norm(t[b, j].tolist(), p["instruction_norm.weight"], p["instruction_norm.bias"])
            # A bias of the keys, if there is one, drops out of the softmax.
            keys.append(p["key.weight"] @ normed + p.get("key.bias", 0))
            values.append(p["value.weight"] @ normed + p["value.bias"])
        where = [j for j in range(t.shape[1]) if valid[b, j]]
        for i in range(v.shape[1]):
            normed = layer_norm(v[b, i].tolist(), p["visual_norm.weight"], p["visual_norm.bias"])
            query = p["query.weight"] @ normed + p["query.bias"] + position[i]
            mixed = torch.zeros(inner, dtype=torch.float64)
            for h in range(heads):
                part = slice(h * width, (h + 1) * width)
                scores = [math.exp(float(query[part] @ keys[j][part]) / math.sqrt(width)) for j in where]
                for score, j in zip(scores, where, strict=True):
                    mixed[part] += score / sum(scores) * values[j][part]
            update[b, i] = p["output.weight"] @ mixed + p["output.bias"]
    return update


def naive(alignment: EmmaAlignment, v: Tensor, t: Tensor, mask: Tensor | None = None, grid=None) -> Tensor:
    p = {name.removeprefix("fusion."): value.detach().double() for name, value in alignment.state_dict().items()}
    v, t = v.double(), t.double()
    valid = torch.ones(t.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    if alignment.config.fusion == "linear":
        hidden = torch.einsum("btk,dk->btd", t, p["instruction_projection.weight"]) + p["instruction_projection.bias"]
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        hidden = hidden * valid[..., None]
        image = p["image_weight"] if "image_weight" in p else p["image_up"] @ p["image_down"]
        text, bias = p["text_weight"], p["bias"][:, None]
        if grid is not None:
            # The rows of the text weights lie on the grid; the image weights see and give native grids.
            text, bias, image = (bilinear(weight, GRID, grid) for weight in (text, bias, image))
            image = image @ averaging(grid, GRID)
        image = image + torch.eye(v.shape[1], dtype=torch.float64)
        out = torch.einsum("mn,bnd->bmd", image, v)
        out += torch.einsum("mt,btd->bmd", text[:, : t.shape[1]], hidden)
        return out + bias
    attention = {name.removeprefix("cross_attention."): value for name, value in p.items()}
    update = naive_cross_attention(attention, v, t, valid, heads=alignment.config.num_heads, grid=grid)
    aligned = v + update if alignment.config.fusion == "attention" else v * 2 / (1 + torch.exp(-update))
    return torch.where(valid.any(dim=1)[:, None, None], aligned, v)


MASKS = {
    "no-mask": None,
    "ragged": ragged_mask(),
    "one-empty": torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 1, 0, 1, 1]], dtype=torch.bool),
}


@every_variant
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("seed", [1, 2])
def test_formula(variant, mask, seed):
    alignment = make(variant, trained=True)
    v, t = tokens(seed=seed)
    assert (alignment(v, t, mask).double() - naive(alignment, v, t, mask)).abs().max() <= 1e-5


@every_variant
def test_formula_in_float64(variant):
    alignment = make(variant, trained=True)
    v, t = tokens(dtype=torch.float64)
    out = alignment(v, t, ragged_mask())
    assert out.dtype == torch.float64
    assert (out - naive(alignment, v, t, ragged_mask())).abs().max() <= 1e-12


@every_variant
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_formula_in_half_precision(variant, dtype):
    alignment = make(variant, trained=True)
    v, t = tokens(dtype=dtype)
    want = naive(alignment, v, t, ragged_mask())
    # Ten roundings of the largest intermediate values, which are a few times the largest result.
    allowed = 10 * torch.finfo(dtype).eps * max(4.0, want.abs().max().item())
    assert (alignment(v, t, ragged_mask()).double() - want).abs().max() <= allowed


@pytest.mark.parametrize("variant", GRIDDED)
@pytest.mark.parametrize("grid", [(1, 1), (3, 2), (1, 6), (4, 5), (2, 7)])
def test_formula_on_another_grid(variant, grid):
    alignment = make(variant, trained=True)
    v, t = tokens(visual=grid[0] * grid[1])
    out = alignment(v, t, ragged_mask(), grid=grid)
    assert (out.double() - naive(alignment, v, t, ragged_mask(), grid)).abs().max() <= 1e-5


@settings(max_examples=budget(15, 40))
@given(st.tuples(*[st.integers(1, 9)] * 4), st.booleans())
def test_resampling_is_pytorchs(sides, antialias):
    source, target = sides[:2], sides[2:]
    table = torch.randn(2, source[0] * source[1], 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    image = table.unflatten(1, source).permute(0, 3, 1, 2)
    expected = F.interpolate(image, size=target, mode="bilinear", align_corners=False, antialias=antialias)
    resampled = resample(table, source, target, antialias=antialias)
    assert (resampled - expected.permute(0, 2, 3, 1).flatten(1, 2)).abs().max() <= 1e-12


@pytest.mark.parametrize("variant", LINEAR)
def test_linear_sees_every_token_of_a_larger_image(variant):
    """Also those between the sampling points of the native grid."""
    alignment = make(variant, trained=True, dtype=torch.float64)
    grid = (4 * GRID[0], 4 * GRID[1])
    v, t = tokens(1, grid[0] * grid[1], dtype=torch.float64)
    v.requires_grad_()
    (alignment(v, t, grid=grid) - v).square().sum().backward()
    assert v.grad.abs().amax(dim=-1).min() > 1e-6


@pytest.mark.parametrize("variant", LINEAR)
def test_linear_reads_a_short_instruction_in_the_first_columns(variant):
    alignment = make(variant, trained=True)
    v, t = tokens(instruction=T - 2)
    assert (alignment(v, t).double() - naive(alignment, v, t)).abs().max() <= 1e-5


@every_variant
@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.uint8, torch.float32], ids=str)
def test_a_mask_of_ones_and_zeros_is_a_mask(variant, kind):
    alignment = make(variant, trained=True)
    v, t = tokens()
    assert same_bits(alignment(v, t, ragged_mask().to(kind)), alignment(v, t, ragged_mask()))


@every_variant
def test_a_mask_of_ones_is_no_mask(variant):
    alignment = make(variant, trained=True, dtype=torch.float64)
    v, t = tokens(dtype=torch.float64)
    assert (alignment(v, t, torch.ones(B, T)) - alignment(v, t)).abs().max() <= 1e-12


@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES, torch.float64], ids=str)
@pytest.mark.parametrize("text_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_output_has_the_dtype_of_the_visual_tokens(variant, dtype, text_dtype, autocast):
    alignment = make(variant, trained=True)
    v, t = tokens()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = alignment(v.to(dtype), t.to(text_dtype), ragged_mask())
    assert out.dtype == dtype
    assert out.shape == v.shape
    assert (out.double() - naive(alignment, v, t, ragged_mask())).abs().max() <= 0.5


@every_variant
def test_weights_start_in_float32_whatever_comes_in(variant):
    alignment = make(variant)
    alignment(*tokens(dtype=torch.bfloat16))
    assert {p.dtype for p in alignment.parameters()} == {torch.float32}


# --- gradients ------------------------------------------------------------------------------------------------


@every_variant
@pytest.mark.parametrize("masked", [False, True], ids=["no-mask", "mask"])
def test_every_parameter_learns_within_two_steps(variant, masked):
    """In float64, where a gradient that is zero but for rounding is below 1e-12: a parameter that can't change the
    output only drifts, because Adam scales the rounding noise up to full steps."""
    alignment = make(variant, dtype=torch.float64)
    v, t = tokens(dtype=torch.float64)
    mask = ragged_mask() if masked else None
    target = torch.randn(v.shape, dtype=torch.float64)
    optimizer = torch.optim.SGD(alignment.parameters(), lr=0.1)
    largest = dict.fromkeys((name for name, _ in alignment.named_parameters()), 0.0)
    for _ in range(2):
        optimizer.zero_grad()
        ((alignment(v, t, mask) - target) ** 2).mean().backward()
        for name, parameter in alignment.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            largest[name] = max(largest[name], parameter.grad.abs().max().item())
        optimizer.step()
    assert [name for name, size in largest.items() if size < 1e-10] == []


@every_variant
def test_training_lowers_the_loss(variant):
    alignment = make(variant)
    v, t = tokens()
    target = v * 1.5 + t.mean(dim=(1, 2), keepdim=True)
    optimizer = torch.optim.Adam(alignment.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = ((alignment(v, t, ragged_mask()) - target) ** 2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@every_variant
@pytest.mark.parametrize(
    "mask", [None, torch.tensor([[1, 1, 0], [0, 0, 0]], dtype=torch.bool)], ids=["no-mask", "mask"]
)
def test_gradcheck(variant, mask):
    changes = {"visual_dim": 3, "instruction_dim": 2, "inner_dim": 4, "max_instruction_tokens": 3}
    if variant not in BLIND:
        changes |= {"num_visual_tokens": 4, "visual_grid": (2, 2)}
    alignment = make(variant, trained=True, dtype=torch.float64, **changes)
    names = [name for name, _ in alignment.named_parameters()]
    v = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    t = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)

    def run(v: Tensor, t: Tensor, *values: Tensor) -> Tensor:
        return functional_call(alignment, dict(zip(names, values, strict=True)), (v, t, mask))

    assert torch.autograd.gradcheck(run, (v, t, *alignment.parameters()))


@pytest.mark.parametrize("variant", POSITIONAL)
def test_gradcheck_on_another_grid(variant):
    alignment = make(variant, trained=True, dtype=torch.float64, visual_dim=3, inner_dim=2)
    v, t = torch.randn(1, 4, 3, dtype=torch.float64), tokens(1, dtype=torch.float64)[1]

    def run(position: Tensor) -> Tensor:
        return functional_call(alignment, {"fusion.cross_attention.position": position}, (v, t), {"grid": (4, 1)})

    assert torch.autograd.gradcheck(run, (alignment.fusion.cross_attention.position,))


# --- masked positions -----------------------------------------------------------------------------------------


def output_and_gradients(alignment: EmmaAlignment, v: Tensor, t: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    v, t = v.clone().requires_grad_(), t.clone().requires_grad_()
    alignment.zero_grad()
    out = alignment(v, t, mask)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in alignment.named_parameters()}
    return {**found, "output": out.detach(), "visual": v.grad, "instruction": t.grad}


@every_variant
@pytest.mark.parametrize("junk", [7.0, 1e30, float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("mask", [MASKS["ragged"], MASKS["one-empty"]], ids=["ragged", "one-empty"])
def test_masked_values_change_nothing(variant, junk, mask):
    alignment = make(variant, trained=True)
    v, t = tokens()
    clean = output_and_gradients(alignment, v, t, mask)
    dirty = output_and_gradients(alignment, v, t.masked_fill(~mask[..., None], junk), mask)
    for name, value in clean.items():
        assert value.isfinite().all(), name
        assert same_bits(value, dirty[name]), name
    assert dirty["instruction"][~mask].eq(0).all()


@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_fully_masked_rows(variant, dtype):
    alignment = make(variant, trained=True)
    v, t = tokens(dtype=dtype)
    mask = MASKS["one-empty"]
    found = output_and_gradients(alignment, v, t, mask)
    assert all(value.isfinite().all() for value in found.values())
    assert found["instruction"][1].eq(0).all()
    assert not same_bits(found["output"][0], v[0])
    if variant in CROSS:
        assert same_bits(found["output"][1], v[1])


@pytest.mark.parametrize("variant", LINEAR)
def test_linear_without_instruction_keeps_the_image_part(variant):
    alignment = make(variant, trained=True)
    v, t = tokens()
    out = alignment(v, t, torch.zeros(B, T))
    assert (out - v).abs().max() > 0.1
    with torch.no_grad():
        alignment.fusion.text_weight.zero_()
    assert (out - alignment(v, t)).abs().max() <= 1e-6


@every_variant
def test_no_instruction_tokens_is_a_fully_masked_instruction(variant):
    """Else an empty instruction would mean one thing alone and another in a padded batch."""
    alignment = make(variant, trained=True)
    v, t = tokens()
    none = alignment(v, t[:, :0])
    assert (none - alignment(v, t, torch.zeros(B, T))).abs().max() <= 1e-6
    assert same_bits(none, alignment(v, t[:, :0], torch.ones(B, 0)))


@pytest.mark.parametrize("variant", CROSS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_trimming_padding_is_exact_for_attention(variant, side):
    alignment = make(variant, trained=True, dtype=torch.float64)
    v, t = tokens(dtype=torch.float64)
    padding, ones = torch.randn(B, 4, DT, dtype=torch.float64), torch.ones(B, T)
    parts, mask = (
        ([padding, t], [torch.zeros(B, 4), ones]) if side == "left" else ([t, padding], [ones, torch.zeros(B, 4)])
    )
    padded = alignment(v, torch.cat(parts, dim=1), torch.cat(mask, dim=1))
    assert (padded - alignment(v, t)).abs().max() <= 1e-12


@pytest.mark.parametrize("variant", LINEAR)
def test_linear_reads_padding_without_a_mask_and_counts_columns(variant):
    """The columns belong to positions: the same tokens one position later are another instruction."""
    alignment = make(variant, trained=True)
    v, t = tokens(instruction=T - 1)
    padding = torch.zeros(B, 1, DT)
    later = alignment(v, torch.cat([padding, t], dim=1), torch.tensor([0, 1, 1, 1, 1]).expand(B, T))
    assert (later - alignment(v, t)).abs().max() > 1e-2
    read = alignment(v, torch.cat([t, padding], dim=1))
    masked = alignment(v, torch.cat([t, padding], dim=1), torch.tensor([1, 1, 1, 1, 0]).expand(B, T))
    assert (masked - alignment(v, t)).abs().max() <= 1e-6
    assert (read - masked).abs().max() > 1e-2


# --- the batch ------------------------------------------------------------------------------------------------


@every_variant
@pytest.mark.parametrize("masked", [False, True], ids=["no-mask", "mask"])
def test_rows_are_independent(variant, masked):
    alignment = make(variant, trained=True, dtype=torch.float64)
    v, t = tokens(6, dtype=torch.float64)
    mask = ragged_mask(6) if masked else None
    together = alignment(v, t, mask)
    for row in range(6):
        one = slice(row, row + 1)
        alone = alignment(v[one], t[one], None if mask is None else mask[one])
        assert (together[one] - alone).abs().max() <= 1e-12
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    permuted = alignment(v[order], t[order], None if mask is None else mask[order])
    assert (permuted - together[order]).abs().max() <= 1e-12


@every_variant
def test_the_gradient_of_a_row_stays_in_the_row(variant):
    alignment = make(variant, trained=True)
    v, t = (x.requires_grad_() for x in tokens())
    alignment(v, t)[1].square().sum().backward()
    for gradient in (v.grad, t.grad):
        assert gradient[[0, 2]].eq(0).all()
        assert gradient[1].abs().max() > 1e-3


@every_variant
@pytest.mark.parametrize("masked", [False, True], ids=["no-mask", "mask"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_a_batch_of_no_rows(variant, masked, dtype):
    alignment = make(variant, trained=True)
    v, t = tokens(0, dtype=dtype)
    out = alignment(v, t, torch.ones(0, T) if masked else None)
    assert out.shape == (0, N, D)
    assert out.dtype == dtype


@every_variant
def test_a_batch_of_no_rows_reaches_every_parameter(variant):
    """As with nn.Linear: else a rank without images has no gradients, and DDP waits for it forever."""
    alignment = make(variant, trained=True)
    alignment(*tokens(0)).sum().backward()
    assert all(p.grad is not None and p.grad.eq(0).all() for p in alignment.parameters())


@pytest.mark.parametrize("variant", BLIND)
def test_images_of_no_tokens(variant):
    v, t = tokens(visual=0)
    assert make(variant, trained=True)(v, t, ragged_mask()).shape == (B, 0, D)


@every_variant
def test_inputs_need_not_be_contiguous(variant):
    alignment = make(variant, trained=True)
    v, t = tokens()
    strided = alignment(v.mT.contiguous().mT, t.mT.contiguous().mT, ragged_mask().mT.contiguous().mT)
    assert (strided - alignment(v, t, ragged_mask())).abs().max() <= 1e-6


@every_variant
def test_inputs_are_left_alone(variant):
    alignment = make(variant, trained=True)
    v, t = tokens()
    mask = ragged_mask()
    before = [x.clone() for x in (v, t, mask)]
    alignment(v, t, mask)
    assert all(torch.equal(x, y) for x, y in zip((v, t, mask), before, strict=True))


# --- misfits --------------------------------------------------------------------------------------------------


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


MISFITS = {
    "visual-width": (ones(B, N, D + 1), ones(B, T, DT), None, "visual_tokens must be"),
    "visual-2d": (ones(N, D), ones(B, T, DT), None, "visual_tokens must be"),
    "visual-4d": (ones(B, 1, N, D), ones(B, T, DT), None, "visual_tokens must be"),
    "instruction-width": (ones(B, N, D), ones(B, T, DT + 1), None, "instruction_tokens must be"),
    "instruction-2d": (ones(B, N, D), ones(B, DT), None, "instruction_tokens must be"),
    "instruction-4d": (ones(B, N, D), ones(B, 1, T, DT), None, "instruction_tokens must be"),
    "batch": (ones(B, N, D), ones(B + 1, T, DT), None, "same batch size"),
    "one-instruction-for-all": (ones(B, N, D), ones(1, T, DT), None, "same batch size"),
    "mask-length": (ones(B, N, D), ones(B, T, DT), ones(B, T + 1), "instruction_mask must be"),
    "mask-batch": (ones(B, N, D), ones(B, T, DT), ones(1, T), "instruction_mask must be"),
    "mask-1d": (ones(B, N, D), ones(B, T, DT), ones(T), "instruction_mask must be"),
    "mask-4d": (ones(B, N, D), ones(B, T, DT), ones(B, 1, 1, T), "instruction_mask must be"),
}


def assert_misfit(message: str, alignment: EmmaAlignment, *args, **kwargs) -> None:
    with pytest.raises(ShapeError, match=message) as caught:
        alignment(*args, **kwargs)
    assert isinstance(caught.value, ValueError)


@every_variant
@pytest.mark.parametrize("misfit", MISFITS.values(), ids=MISFITS)
def test_misfits_are_shape_errors(variant, misfit):
    *args, message = misfit
    assert_misfit(message, make(variant), *args)


@pytest.mark.parametrize("variant", LINEAR)
def test_linear_is_made_for_one_number_of_tokens(variant):
    alignment = make(variant)
    assert_misfit(f"{N} visual tokens .* got {N + 1}", alignment, ones(B, N + 1, D), ones(B, T, DT))
    assert_misfit(f"{N} visual tokens .* got 1", alignment, ones(B, 1, D), ones(B, T, DT))
    assert_misfit(f"at most {T} instruction tokens .* got {T + 1}", alignment, ones(B, N, D), ones(B, T + 1, DT))


@pytest.mark.parametrize("variant", GRIDDED)
def test_grids_that_do_not_fit(variant):
    gridless = make(variant, visual_grid=None)
    assert_misfit(f"{N} visual tokens .*got {N + 1}", make(variant), ones(B, N + 1, D), ones(B, T, DT))
    assert_misfit(rf"grid=.*{N + 1} visual tokens", make(variant), ones(B, N + 1, D), ones(B, T, DT), grid=GRID)
    assert_misfit(r"grid=\(3, 3\)", make(variant), ones(B, N, D), ones(B, T, DT), grid=(3, 3))
    assert_misfit(r"grid=\(4, 5\).*visual_grid", gridless, ones(B, 20, D), ones(B, T, DT), grid=(4, 5))


@pytest.mark.parametrize("variant", GRIDDED)
@pytest.mark.parametrize("grid", [(-2, -3), (2, 3, 1)])
def test_grids_that_are_none(variant, grid):
    assert_misfit("grid", make(variant), ones(B, N, D), ones(B, T, DT), grid=grid)


@pytest.mark.parametrize("name", ["visual_dim", "instruction_dim"])
@every_variant
def test_sizes_that_an_alignment_needs(variant, name):
    with pytest.raises(ConfigError, match=f"EmmaConfig.{name} must be given"):
        make(variant, **{name: None})


@pytest.mark.parametrize("name", ["num_visual_tokens", "max_instruction_tokens"])
def test_sizes_that_linear_needs(name):
    with pytest.raises(ConfigError, match=f"EmmaConfig.{name} must be given"):
        make("linear", **{"visual_grid": None, name: None})


# --- positions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", CROSS)
def test_equal_tokens_differ_by_position_only(variant):
    v, t = tokens()
    v = v[:, :1].expand(B, N, D)
    out = make(variant, trained=True, dtype=torch.float64)(v.double(), t.double())
    for i, j in itertools.combinations(range(N), 2):
        difference = (out[:, i] - out[:, j]).abs().max()
        assert difference > 1e-3 if variant in POSITIONAL else difference <= 1e-12


@pytest.mark.parametrize("variant", GRIDDED)
def test_the_native_grid_is_no_resampling(variant):
    alignment = make(variant, trained=True)
    v, t = tokens()
    assert same_bits(alignment(v, t, grid=GRID), alignment(v, t))
    assert (alignment(v, t, grid=(3, 2)) - alignment(v, t)).abs().max() > 1e-3


@pytest.mark.parametrize("variant", POSITIONAL)
@pytest.mark.parametrize("grid", [(1, 1), (3, 3), (4, 6), (7, 2)])
def test_a_constant_table_is_constant_on_any_grid(variant, grid):
    alignment = make(variant, trained=True, dtype=torch.float64)
    with torch.no_grad():
        position = alignment.fusion.cross_attention.position
        position.copy_(torch.randn(1, position.shape[1]).expand_as(position))
    v, t = tokens(visual=1, dtype=torch.float64)
    native = alignment(v.expand(B, N, D), t)
    other = alignment(v.expand(B, grid[0] * grid[1], D), t, grid=grid)
    assert (native - native[:, :1]).abs().max() <= 1e-12
    assert (other - native[:, :1]).abs().max() <= 1e-12


@pytest.mark.parametrize("variant", BLIND)
@settings(max_examples=budget(8, 20))
@given(visual=st.integers(1, 40), seed=st.integers(0, 9))
def test_without_positions_any_number_and_order_of_tokens_works(variant, visual, seed):
    alignment = make(variant, trained=True, dtype=torch.float64)
    v, t = tokens(2, visual, dtype=torch.float64, seed=seed)
    out = alignment(v, t)
    order = torch.randperm(visual, generator=torch.Generator().manual_seed(seed))
    assert (alignment(v[:, order], t) - out[:, order]).abs().max() <= 1e-12
    assert (alignment(v[:, :1], t) - out[:, :1]).abs().max() <= 1e-12


# --- modules and registry -------------------------------------------------------------------------------------


@every_variant
def test_no_module_with_weights_is_an_nn_linear(variant):
    """PEFT's "all-linear" and quantisation rewrite every nn.Linear they find."""
    with_weights = [m for m in make(variant).modules() if list(m.parameters(recurse=False))]
    assert with_weights
    assert not [m for m in with_weights if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding))]


@every_variant
def test_state_dict_round_trip(variant):
    trained, fresh = make(variant, trained=True), make(variant)
    fresh.load_state_dict(trained.state_dict())
    v, t = tokens()
    assert same_bits(fresh(v, t, ragged_mask()), trained(v, t, ragged_mask()))
    assert set(trained.state_dict()) == {name for name, _ in trained.named_parameters()}


def test_rank_saves_parameters():
    def image_parameters(alignment: EmmaAlignment) -> int:
        return sum(p.numel() for name, p in alignment.named_parameters() if ".image_" in name)

    assert image_parameters(make("linear")) == N * N
    assert image_parameters(make("linear-rank")) == 2 * 2 * N


class Shift(Fusion):
    def __init__(self, config: EmmaConfig) -> None:
        super().__init__(config)
        self.amount = nn.Parameter(torch.zeros(config.visual_dim))
        self.factor = config.fusion_options.get("factor", 1)
        self.seen = []

    def forward(self, visual_tokens, instruction_tokens, instruction_mask, grid=None):
        self.seen.append((instruction_tokens.dtype, instruction_mask, grid))
        return visual_tokens + self.factor * self.amount


def test_built_in_fusions():
    assert set(fusion_names()) == {"attention", "linear", "moda", "modulation"}
    assert not any(fusion_class(name).fixed_num_visual_tokens for name in fusion_names())
    assert [name for name in fusion_names() if fusion_class(name).reads_padding] == ["linear"]


def test_a_fusion_of_ones_own(registry):
    with pytest.raises(ConfigError, match=r"EmmaConfig.fusion.*'mine'"):
        EmmaConfig(fusion="mine")
    assert register_fusion("mine")(Shift) is Shift
    assert "mine" in fusion_names()
    config = EmmaConfig(fusion="mine", visual_dim=D, instruction_dim=DT, fusion_options={"factor": 3})
    alignment = EmmaAlignment(EmmaConfig.from_json(config.to_json()))
    assert isinstance(alignment.fusion, Shift)
    v, t = tokens(dtype=torch.bfloat16)
    mask = ragged_mask().long()
    assert_identity(alignment, v, t.float(), mask, grid=(3, 2))
    seen_dtype, seen_mask, seen_grid = alignment.fusion.seen[0]
    assert seen_dtype == torch.bfloat16
    assert torch.equal(seen_mask, ragged_mask())
    assert seen_grid == (3, 2)
    torch.nn.init.ones_(alignment.fusion.amount)
    assert torch.equal(alignment(v.float(), t), v.float() + 3)
    assert alignment(v, t).dtype == torch.bfloat16
    alignment(v, t).sum().backward()
    assert alignment.fusion.amount.grad.abs().min() > 0
    assert_misfit("instruction_mask", alignment, v, t, ones(B, T + 1))


def test_a_name_is_taken_once(registry):
    register_fusion("mine")(Shift)
    assert register_fusion("mine")(Shift) is Shift

    class Other(Shift):
        pass

    for name in ("mine", "linear"):
        with pytest.raises(ConfigError, match=f"'{name}' is registered already"):
            register_fusion(name)(Other)
    assert registry["mine"] is Shift
    assert registry["linear"] is not Other


@pytest.mark.parametrize("thing", [nn.Linear, nn.Module, object, lambda config: None, "linear", None])
def test_what_is_no_fusion_is_refused(registry, thing):
    with pytest.raises(ConfigError, match=r"subclass of emma_adapter\.Fusion"):
        register_fusion("mine")(thing)
    assert "mine" not in fusion_names()


def test_a_fusion_must_have_a_forward(registry):
    @register_fusion("mine")
    class Unfinished(Fusion):
        pass

    with pytest.raises(TypeError, match="forward"):
        EmmaAlignment(EmmaConfig(fusion="mine", visual_dim=D, instruction_dim=DT))


@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["no-mask", "mask"])
def test_negative_zeros_stay(variant, dtype, masked):
    alignment = make(variant)
    v, t = tokens(dtype=dtype)
    v = torch.where(torch.rand(v.shape) < 0.5, torch.tensor(-0.0, dtype=dtype), v)
    assert same_bits(alignment(v, t, ragged_mask() if masked else None), v)


@every_variant
def test_integer_visual_tokens_are_refused(variant):
    with pytest.raises(ShapeError, match="floating-point"):
        make(variant)(torch.ones(B, N, D, dtype=torch.long), torch.ones(B, T, DT))


@pytest.mark.parametrize("name", [3, None, ""])
def test_fusions_need_a_name(name):
    with pytest.raises(ConfigError, match="name"):
        register_fusion(name)(fusion_class("linear"))


@pytest.mark.parametrize("fusion", ["attention", "linear", "modulation"])
@settings(max_examples=budget(6, 15))
@given(data=st.data())
def test_packed_images_are_aligned_as_if_each_were_alone(fusion, data):
    """Of any grids, in raster order or another, with instructions shared, unused or empty."""
    sizes = {"visual_dim": 16, "instruction_dim": 6, "visual_grid": (3, 4), "max_instruction_tokens": 5}
    alignment = EmmaAlignment(EmmaConfig(fusion=fusion, **sizes)).double()
    with torch.no_grad():
        for parameter in alignment.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    grids = data.draw(st.lists(st.sampled_from([(3, 4), (2, 2), (1, 5)]), max_size=5))
    rows = torch.tensor([data.draw(st.integers(0, 2)) for _ in grids], dtype=torch.long)
    ordered = data.draw(st.booleans())
    orders = {grid: torch.randperm(grid[0] * grid[1]) for grid in grids} if ordered else None
    v = torch.randn(sum(h * w for h, w in grids), 16, dtype=torch.float64)
    t, mask = torch.randn(3, 5, 6, dtype=torch.float64), torch.tensor([[1] * 5, [1, 1, 0, 0, 0], [0] * 5]).bool()
    found = alignment(v, t, mask, packing=Packing(grids, rows, orders))
    expected = [v[:0]]
    for piece, grid, row in zip(v.split([h * w for h, w in grids]), grids, rows, strict=True):
        # The token at place i of a sequence is the one at place order[i] of the image.
        order = torch.arange(len(piece)) if orders is None else orders[grid]
        image = torch.empty_like(piece)
        image[order] = piece
        expected.append(alignment(image[None], t[row][None], mask[row][None], grid=grid)[0][order])
    assert found.shape == v.shape
    assert torch.allclose(found, torch.cat(expected), atol=1e-12)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("fusion", "strict"), some(1, ["attention", "linear"], [True, False]))
def test_export_leaves_nothing_behind(fusion, strict, monkeypatch):
    """Tracing runs this code on tensors without numbers, which must not turn up in a later call."""
    monkeypatch.setattr(resampling, "_WEIGHTS", {})
    sizes = {"visual_dim": 16, "instruction_dim": 6, "visual_grid": (2, 3), "max_instruction_tokens": 4}
    alignment = EmmaAlignment(EmmaConfig(fusion=fusion, **sizes))
    with torch.no_grad():
        for parameter in alignment.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))

    class OnAnotherGrid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.alignment = alignment

        def forward(self, v: Tensor, t: Tensor) -> Tensor:
            return self.alignment(v, t, grid=(2, 4))

    v, t = torch.randn(2, 8, 16), torch.randn(2, 4, 6)
    for _ in range(2):  # the second time, the matrices are known
        exported = torch.export.export(OnAnotherGrid(), (v, t), strict=strict).module()
        found = alignment(v, t, grid=(2, 4))
        assert type(found) is Tensor
        assert (exported(v, t) - found).abs().max() <= 1e-6


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_graph_does_not_follow_other_grids():
    sizes = {"visual_dim": 16, "instruction_dim": 6, "visual_grid": (2, 3)}
    alignment = EmmaAlignment(EmmaConfig(**sizes))
    compiled = torch.compile(lambda v, t: alignment(v, t, grid=(2, 4)), fullgraph=True, backend="aot_eager")
    v, t = torch.randn(2, 8, 16), torch.randn(2, 4, 6)
    assert torch.equal(compiled(v, t), v)
    alignment(torch.randn(1, 35, 16), t[:1], grid=(5, 7))
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(compiled(v, t), v)
