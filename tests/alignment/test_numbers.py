"""Numbers at the edge of their range, and images at the edge of theirs, against the formulas in float64.

``tests/kernels/test_numbers_interpreted.py`` does the same for the Triton kernels.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from emma_adapter import EmmaAlignment, EmmaConfig, Packing, patch_model
from tests.kernels.precision import DTYPES, TOLERANCES
from tests.support import tiny
from tests.support.budget import budget, combinations
from tests.support.formulas import assert_correct, expected, formula, results, same, same_bits, weighting
from tests.support.zoo import ZOO, Row

GRID, D, T, DT = (2, 3), 16, 5, 12
N = GRID[0] * GRID[1]
VARIANTS = {
    "attention": {"fusion": "attention"},
    "modulation": {"fusion": "modulation"},
    "linear": {"fusion": "linear"},
    "linear-rank": {"fusion": "linear", "rank": 2},
}
CROSS = ["attention", "modulation"]
BROKEN = [float("nan"), float("inf"), -float("inf")]

every_variant = pytest.mark.parametrize("variant", list(VARIANTS))
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def make(variant: str, dtype: torch.dtype = torch.float32, *, trained: bool = True, **changes) -> EmmaAlignment:
    """Its weights are numbers that ``dtype`` holds exactly, and that all computations can start from."""
    torch.manual_seed(3)
    sizes = {"visual_dim": D, "instruction_dim": DT, "visual_grid": GRID, "max_instruction_tokens": T}
    alignment = EmmaAlignment(EmmaConfig(**{**sizes, "inner_dim": 16, "num_heads": 2, **VARIANTS[variant], **changes}))
    if trained:
        tiny.train_randomly(alignment, scale=0.2)
    return alignment.to(dtype).float()


def tokens(batch: int = 3, visual: int = N, *, dtype: torch.dtype = torch.float32, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(batch, visual, D, generator=generator)
    return v.to(dtype), torch.randn(batch, T, DT, generator=generator).to(dtype)


# --- large numbers ----------------------------------------------------------------------------------------------

#: Where gradients go through the choice between instruction tokens.
CHOICE = (
    *("query.weight", "query.bias", "key.weight", "position", "v", "t"),
    *("visual_norm.weight", "visual_norm.bias", "instruction_norm.weight", "instruction_norm.bias"),
)


@every_dtype
@pytest.mark.parametrize("variant", CROSS)
@pytest.mark.parametrize("size", [2_000, 30_000])
@pytest.mark.parametrize("masked", [False, True], ids=["no-mask", "mask"])
def test_attention_scores_far_beyond_the_range_of_float16(variant, dtype, size, masked):
    """Queries and keys near its limit, whose products are not, with one clear winner in each head."""
    alignment = make(variant)
    attention = alignment.fusion.cross_attention
    with torch.no_grad():
        attention.query.bias.fill_(size)
        attention.key.weight.mul_(size / 10)
    alignment = alignment.to(dtype).float()
    v, t = tokens(dtype=dtype)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 0, 0, 1], [1, 0, 0, 0, 0]]).bool() if masked else None
    key = F.layer_norm(t.double(), (DT,)) @ attention.key.weight.double().T
    scores = size * key.unflatten(-1, (2, -1)).sum(-1) / math.sqrt(8)
    if masked:
        scores = scores.masked_fill(~mask[..., None], -1e30)
    first, second = scores.topk(2, dim=1).values.unbind(1)
    assert key.abs().max() < 65_504 < first.abs().max()
    assert ((first - second) / key.abs().amax()).min() > 0.02 * size
    # The choice is certain: its gradients are zero, but for what rounding leaves of differences of large numbers.
    assert_correct(alignment, v, t, mask, only_finite=CHOICE)


@every_dtype
@every_variant
@pytest.mark.parametrize("outlier", [1e4, -1e4])
def test_channels_ten_thousand_times_the_others(variant, dtype, outlier):
    """CLIP's and SigLIP's towers have such channels. Their squares are beyond float16."""
    alignment = make(variant, dtype)
    v, t = tokens(dtype=dtype)
    v[..., 3], v[0, 2, 5] = outlier, -outlier
    assert_correct(alignment, v, t)
    t[..., 7] = outlier
    # Beside such a channel all instruction tokens are alike once they are normalised.
    assert_correct(alignment, v, t, only_finite=CHOICE)


@every_dtype
@pytest.mark.parametrize("variant", CROSS)
def test_a_mean_far_above_the_deviation(variant, dtype):
    alignment = make(variant, dtype)
    v, t = tokens(dtype=dtype)
    v, t = v + (50 if dtype == torch.float32 else 8), t + 8
    assert v.mean(-1).min() > 5 * v.std(-1).max()
    assert_correct(alignment, v, t, only_finite=CHOICE)


@every_dtype
@pytest.mark.parametrize("variant", CROSS)
@pytest.mark.parametrize("value", [0.0, 1.0, 100.0])
def test_tokens_without_any_deviation(variant, dtype, value):
    alignment = make(variant, dtype)
    v, t = tokens(dtype=dtype)
    v[0, 1], t[1, 2] = value, value
    found = results(alignment, v, t)
    # Their normalised values are zero, and the gradient through that is hundreds of times what reaches it.
    assert all(value.isfinite().all() for value in found.values())
    want = expected(alignment, v, t)["y"]
    assert (found["y"].double() - want).abs().max() <= TOLERANCES[dtype][0] * want.abs().max()


@every_dtype
def test_gates_that_are_all_the_way_open_or_shut(dtype):
    alignment = make("modulation", dtype)
    with torch.no_grad():
        alignment.fusion.cross_attention.output.bias[::2] = 1e4
        alignment.fusion.cross_attention.output.bias[1::2] = -1e4
    v, t = tokens(dtype=dtype)
    found = results(alignment.to(dtype).float(), v, t)
    assert torch.equal(found["y"][..., ::2], 2 * v[..., ::2])
    assert found["y"][..., 1::2].eq(0).all()
    assert all(value.isfinite().all() for value in found.values())


@every_variant
@pytest.mark.parametrize("value", [60_000.0, 64_992.0, -60_000.0])
def test_what_float16_cannot_hold_is_infinite_as_in_any_sum(variant, value):
    """And nothing else is: the result is the formula's, rounded."""
    alignment = make(variant, trained=False)
    with torch.no_grad():
        if variant.startswith("linear"):
            alignment.fusion.bias.copy_(torch.linspace(-2, 2, N).round() * 4_096)
        elif variant == "attention":
            alignment.fusion.cross_attention.output.bias.copy_(torch.linspace(-2, 2, D).round() * 4_096)
        else:
            alignment.fusion.cross_attention.output.bias.copy_(torch.linspace(-2, 2, D).round())
    v, t = tokens(dtype=torch.float16)
    v[..., ::5] = value
    want = expected(alignment, v, t)["y"]
    assert want.abs().max() > 65_520
    beyond = want.abs() >= 65_520
    found = alignment(v, t)
    assert torch.equal(found.isinf(), beyond)
    assert found[beyond].sign().eq(want[beyond].sign()).all()
    assert (found[~beyond].double() - want[~beyond]).abs().max() <= 2e-3 * want[~beyond].abs().max()


@pytest.mark.parametrize("variant", [*CROSS, "linear"])
def test_a_weight_that_float16_cannot_hold_shows(variant):
    """An overflow of the adapter's own isn't mistaken for a visual token that came in broken, and passed over."""
    alignment = make(variant)
    weights = {
        "attention": "fusion.cross_attention.value.weight",
        "modulation": "fusion.cross_attention.value.weight",
        "linear": "fusion.image_weight",
    }
    v, t = tokens(dtype=torch.float16)
    before = alignment(v, t)
    with torch.no_grad():
        alignment.get_parameter(weights[variant])[0] = 1e5
    found = alignment(v, t)
    assert before.isfinite().all()
    # The row of an image weight is one token's.
    assert not (found[:, 0] if variant == "linear" else found).isfinite().any()
    # float32 holds it.
    assert alignment(v.float(), t.float()).isfinite().all()


@every_variant
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_of_large_tokens(variant, dtype):
    alignment = make(variant)
    v, t = tokens()
    v[..., 3], t[..., 7] = 1e4, 1e4
    with torch.autocast("cpu", dtype):
        found = results(alignment, v, t)
    want = expected(alignment, v, t)["y"]
    assert found["y"].dtype == torch.float32
    assert (found["y"] - want).abs().max() <= 2e-2 * want.abs().max()
    assert all(value.isfinite().all() for value in found.values())


# --- instructions that say nothing --------------------------------------------------------------------------------


@every_variant
@pytest.mark.parametrize(
    ("kind", "rows", "junk"),
    combinations([torch.bool, torch.int64, torch.uint8, torch.float32], [(1,), (0, 1, 2)], [7.0, *BROKEN]),
    ids=str,
)
def test_rows_whose_instruction_is_all_masked(variant, kind, rows, junk):
    """They stay as they are, and so does what becomes of the others; also where the visual tokens are broken too."""
    alignment = make(variant)
    v, t = tokens()
    mask = torch.ones(3, T)
    mask[list(rows)] = 0
    clean = results(alignment, v, t, mask.to(kind))
    t[list(rows)] = junk
    broken = v.clone()
    broken[rows[0], 2, 4] = float("nan")
    dirty = results(alignment, broken, t, mask.to(kind))
    others = [row for row in range(3) if row not in rows]
    assert same_bits(clean["y"][others], dirty["y"][others])
    if variant in CROSS:
        assert same_bits(clean["y"][list(rows)], v[list(rows)])
        assert same(dirty["y"][list(rows)], broken[list(rows)])
        assert torch.equal(clean["v"][list(rows)], weighting(v)[list(rows)])
        assert all(torch.equal(dirty[name], value) for name, value in clean.items() if name != "y")
    assert dirty["t"][list(rows)].eq(0).all()
    assert all(value.isfinite().all() for name, value in dirty.items() if name != "y")
    if len(rows) == 3 and variant in CROSS:
        assert all(value.eq(0).all() for name, value in dirty.items() if name not in ("y", "v"))


# --- what is not finite -------------------------------------------------------------------------------------------


@st.composite
def breakages(draw):
    """Images of several sizes, and one value of them that isn't finite: entry, token, channel and value."""
    grids = draw(st.lists(st.sampled_from([(2, 3), (3, 2), (1, 1), (4, 4)]), min_size=1, max_size=4))
    entry = draw(st.integers(0, len(grids) - 1))
    token = draw(st.integers(0, grids[entry][0] * grids[entry][1] - 1))
    rows = [draw(st.integers(0, 2)) for _ in grids]
    return grids, rows, entry, token, draw(st.integers(0, D - 1)), draw(st.sampled_from(BROKEN))


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("trained", [False, True], ids=["untrained", "trained"])
@every_variant
@every_dtype
@settings(max_examples=4)
@given(breakage=breakages())
def test_a_value_that_is_not_finite_stays_where_it_is(variant, trained, packed, dtype, breakage):
    """It is returned as it is. For every other value of the output, and every gradient of the weights, it might as well
    not be there."""
    grids, rows, entry, token, channel, value = breakage
    alignment = make(variant, dtype, trained=trained)
    _, t = tokens(dtype=dtype)
    if not packed:
        grids = [grids[entry]] * len(grids)
    lengths = [height * width for height, width in grids]
    place = sum(lengths[:entry]) + token
    flat = tokens(1, sum(lengths), dtype=dtype)[0][0]
    broken = flat.clone()
    broken[place, channel] = value
    absent = flat.clone()
    absent[place, slice(None) if variant in CROSS else channel] = 0

    def run(v: Tensor) -> dict[str, Tensor]:
        if packed:
            return results(alignment, v, t, packing=Packing(grids, torch.tensor(rows)))
        found = results(alignment, v.view(len(grids), -1, D), t[rows], grid=grids[0])
        return {name: value.flatten(0, 1) if name in ("y", "v") else value for name, value in found.items()}

    found, plain, without = run(broken), run(flat), run(absent)
    y = found["y"]
    assert same(y[place, channel], broken[place, channel])
    assert y.isfinite().sum() == y.numel() - 1
    others = torch.ones(len(flat), dtype=torch.bool)
    others[place] = False
    if variant in CROSS or not trained:
        assert same(y[place], broken[place])
        assert same_bits(y[others], plain["y"][others])
    else:
        assert same_bits(y[others], without["y"][others])
        own_image = torch.zeros(len(flat), dtype=torch.bool)
        own_image[sum(lengths[:entry]) : sum(lengths[: entry + 1])] = True
        channels = torch.arange(D) != channel
        assert same_bits(y[~own_image], plain["y"][~own_image])
        assert same_bits(y[:, channels], plain["y"][:, channels])
    for name, gradient in found.items():
        assert name == "y" or gradient.isfinite().all(), name
    if variant in CROSS:
        assert torch.equal(found["v"][place], weighting(y)[place])
    else:
        for name in ("fusion.text_weight", "fusion.bias"):
            assert torch.equal(found[name], plain[name])


@every_variant
@pytest.mark.parametrize("value", BROKEN)
def test_a_broken_instruction_breaks_its_own_rows(variant, value):
    alignment = make(variant)
    v, t = tokens(4)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()
    clean = alignment(v, t, mask)
    masked, read = t.clone(), t.clone()
    masked[1, 4, 2] = masked[2, 0, 0] = value
    assert same_bits(alignment(v, masked, mask), clean)
    read[1, 2, 2] = value
    found = alignment(v, read, mask)
    assert same_bits(found[[0, 2, 3]], clean[[0, 2, 3]])
    # No part of the answer can be to a question that nobody can read.
    assert not found[1].isfinite().any()
    packing = Packing([(1, 1), GRID, (2, 2)], torch.tensor([1, 0, 3]))
    packed = torch.cat([v[0, :1], v[1], v[2, :4]])
    plain = alignment(packed, t, mask, packing=packing)
    assert same_bits(alignment(packed, read, mask, packing=packing)[1:], plain[1:])


@every_variant
def test_many_broken_values_at_once(variant):
    alignment = make(variant)
    v, t = tokens(8, seed=2)
    where = torch.rand(v.shape, generator=torch.Generator().manual_seed(0)) < 0.05
    broken = torch.where(where, torch.tensor(BROKEN)[torch.randint(3, v.shape)], v)
    found = results(alignment, broken, t)
    assert same(found["y"][where], broken[where])
    assert found["y"][~where].isfinite().all()
    assert all(value.isfinite().all() for name, value in found.items() if name != "y")


@pytest.mark.parametrize("variant", ["attention", "linear"])
@pytest.mark.parametrize("transform", ["vmap", "grad", "jacrev", "compile", "trace"])
@pytest.mark.filterwarnings("ignore")
def test_broken_values_where_code_may_not_look_at_them(variant, transform):
    """Nothing here knows a value before all of it is computed."""
    alignment = make(variant)
    v, t = tokens(2)
    v[1, 2, 3] = float("nan")
    want = alignment(v, t).detach()

    def align(own: Tensor) -> Tensor:
        return alignment(own, t)

    if transform == "vmap":
        found = torch.vmap(align)(torch.stack([v, v]))[1]
    elif transform == "compile":
        found = torch.compile(align, fullgraph=True, backend="aot_eager")(v)
    elif transform == "trace":
        found = torch.jit.trace(alignment, (torch.zeros_like(v), t), check_trace=False)(v, t)
    elif transform == "grad":
        gradient = torch.func.grad(lambda own: align(own).nan_to_num().sum())(v)
        assert gradient.isfinite().all()
        return
    else:
        jacobian = torch.func.jacrev(lambda own: align(own)[0, 0])(v)
        assert jacobian[:, 0].isfinite().all()
        return
    assert torch.equal(found.isfinite(), want.isfinite())
    assert (found - want).nan_to_num().abs().max() <= 1e-6


# --- few, many and large images -----------------------------------------------------------------------------------


@every_dtype
@every_variant
def test_images_of_one_token(variant, dtype):
    assert_correct(make(variant, dtype), *tokens(visual=1, dtype=dtype), grid=(1, 1))
    single = make(variant, dtype, visual_grid=(1, 1), **({"rank": 1} if variant == "linear-rank" else {}))
    assert_correct(single, *tokens(visual=1, dtype=dtype))
    assert_correct(single, *tokens(visual=12, dtype=dtype), grid=(3, 4))


@every_dtype
@every_variant
def test_no_images(variant, dtype):
    """A batch or a packing without one, and instructions that no image meets."""
    alignment = make(variant, dtype)
    v, t = tokens(dtype=dtype)
    for found in (
        results(alignment, v[:0], t[:0]),
        results(alignment, v[:0, :4], t[:0], torch.ones(0, T), grid=(4, 1)),
        results(alignment, v[0, :0], t, torch.ones(3, T), packing=Packing([], torch.zeros(0, dtype=torch.long))),
    ):
        assert found["y"].numel() == 0
        assert all(value is None or value.eq(0).all() for value in found.values())
    found = results(alignment, v[0], t, packing=Packing([GRID], torch.tensor([1])))
    assert found["t"][[0, 2]].eq(0).all()
    assert found["t"][1].ne(0).any()


@every_dtype
@every_variant
def test_sixty_four_images(variant, dtype):
    alignment = make(variant, dtype)
    v, t = tokens(64, dtype=dtype)
    mask = torch.arange(T) <= torch.arange(64)[:, None] % T
    # PyTorch's attention in half precision loses those in the sum over so many images.
    assert_correct(alignment, v, t, mask, only_finite=() if dtype == torch.float32 else CHOICE)
    grids = [(1 + index % 5, 1 + index * 7 % 6) for index in range(64)]
    rows = torch.arange(64) * 5 % 3
    flat = tokens(1, sum(height * width for height, width in grids), dtype=dtype)[0][0]
    found = alignment(flat, t[:3], packing=Packing(grids, rows))
    pieces = zip(flat.split([height * width for height, width in grids]), grids, rows, strict=True)
    p = {name: value.detach().double() for name, value in alignment.named_parameters()}
    want = [formula(alignment.config, p, x[None].double(), t[row][None].double(), None, g)[0] for x, g, row in pieces]
    want = torch.cat(want)
    assert (found.double() - want).abs().max() <= TOLERANCES[dtype][0] * want.abs().max()


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                # A view that repeats numbers takes no memory.
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


@pytest.mark.parametrize("grid", budget([(128, 128)], [(128, 128), (1, 16_384), (16_384, 1)]), ids=str)
@every_variant
def test_an_image_of_sixteen_thousand_tokens(variant, grid):
    """Nothing grows with the square of their number."""
    alignment = make(variant, visual_grid=(24, 24), **({"rank": 8} if variant == "linear-rank" else {}))
    v, t = tokens(1, 16_384)
    with Largest() as largest:
        found = results(alignment, v, t, grid=grid)
    assert largest.elements <= 16_384 * max(D, 2 * T) * 2
    want = expected(alignment, v, t, grid=grid)
    for name, value in found.items():
        # Gradients are sums over all tokens, in float32.
        off = (value.double() - want[name]).abs().max() / want[name].abs().max()
        assert off <= (1e-5 if name == "y" else 1e-4), (name, off)


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_a_large_image_beside_images_of_one_token(variant):
    alignment = make(variant)
    _, t = tokens()
    grids = [(1, 1), (128, 128), (1, 1), (1, 40)]
    flat = tokens(1, 16_384 + 42)[0][0]
    found = alignment(flat, t, packing=Packing(grids, torch.tensor([2, 0, 1, 0])))
    p = {name: value.detach().double() for name, value in alignment.named_parameters()}
    start = 0
    for (height, width), row in zip(grids, (2, 0, 1, 0), strict=True):
        own = slice(start, start + height * width)
        args = (flat[own][None].double(), t[row][None].double(), None, (height, width))
        want = formula(alignment.config, p, *args)[0]
        assert (found[own] - want).abs().max() <= 1e-5 * want.abs().max()
        start += height * width


# --- real models --------------------------------------------------------------------------------------------------


def read_by_projector(model: nn.Module, projector: nn.Module, **inputs) -> Tensor:
    """``[..., D]``, what the projector is called with; for Qwen's merger before its norm."""
    seen = []
    handle = projector.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return torch.cat(seen)


def patched(model: nn.Module, variant: str, **changes):
    adapter = patch_model(model, EmmaConfig(**{**VARIANTS[variant], "inner_dim": 16, "num_heads": 2, **changes}))
    tiny.train_randomly(adapter.alignment, scale=0.2)
    return adapter


@every_variant
def test_sixty_four_images_in_one_row_of_llava(variant):
    model, inputs = tiny.llava(), tiny.token_inputs([64, 1])
    before = read_by_projector(model, model.model.multi_modal_projector, **inputs)
    asked = torch.tensor([[5, 6, 7], [8, 9, 10]])
    adapter = patched(model, variant, max_instruction_tokens=8)
    after = read_by_projector(model, model.model.multi_modal_projector, **inputs, instruction=asked)
    p = {name: value.detach().double() for name, value in adapter.alignment.named_parameters()}
    instruction = model.get_input_embeddings()(asked).detach().double()[[0] * 64 + [1]]
    want = formula(adapter.alignment.config, p, before.double(), instruction)
    assert (after - want).abs().max() <= 1e-5 * want.abs().max()


def in_blocks(picture: Tensor, grid: tuple[int, int]) -> Tensor:
    """``[H W, C]``, row by row, in the order of Qwen's patches: those of two by two that are merged lie together."""
    height, width = grid
    blocks = picture.unflatten(0, (height // 2, 2, width // 2, 2))
    return blocks.transpose(1, 2).flatten(0, 3)


def of_blocks(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """The inverse of :func:`in_blocks`."""
    numbers = in_blocks(torch.arange(len(patches))[:, None], grid)[:, 0]
    return patches[numbers.argsort()]


def assert_qwen_correct(adapter, before: Tensor, after: Tensor, grids, instructions: list[Tensor]) -> None:
    p = {name: value.detach().double() for name, value in adapter.alignment.named_parameters()}
    start = 0
    for grid, instruction in zip(grids, instructions, strict=True):
        own = slice(start, start + grid[0] * grid[1])
        picture = of_blocks(before[own].double(), grid)[None]
        want = formula(adapter.alignment.config, p, picture, instruction[None].double(), None, grid)[0]
        assert (of_blocks(after[own], grid) - want).abs().max() <= 1e-5 * want.abs().max()
        start += grid[0] * grid[1]
    assert start == len(before) == len(after)


@every_variant
def test_sixty_four_images_of_different_sizes_in_a_call_of_qwen(variant):
    entry = ZOO["qwen2_vl"]
    model = entry.model()
    sizes = [(28 * (1 + index % 4), 28 * (1 + index * 5 % 3)) for index in range(64)]
    batch = entry.batch([Row(images=tuple(sizes[:40])), Row(("how many?",), images=tuple(sizes[40:]), seed=2)])
    before = read_by_projector(model, model.model.visual.merger, **batch)
    asked = torch.tensor([[5, 6, 7], [8, 9, 10]])
    adapter = patched(model, variant, max_instruction_tokens=8, visual_grid=(4, 4))
    after = read_by_projector(model, model.model.visual.merger, **batch, instruction=asked)
    grids = [(height, width) for _, height, width in batch["image_grid_thw"].tolist()]
    assert len(set(grids)) > 8
    instruction = model.get_input_embeddings()(asked).detach()
    assert_qwen_correct(adapter, before, after, grids, [instruction[int(index >= 40)] for index in range(64)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_untrained_low_rank_is_the_identity_where_its_first_product_overflows(dtype):
    """``A (B V)`` with A zero, and B V too large for float16."""
    alignment = make("linear-rank", dtype, trained=False)
    v, t = tokens(dtype=dtype)
    v[:, :, 3] = 60_000
    with torch.no_grad():
        alignment.fusion.image_down.abs_()
    assert (alignment.fusion.image_down @ v.float()).abs().max() > 65_504
    assert same_bits(alignment(v, t), v)
    assert same_bits(alignment(v[:, :4], t, grid=(2, 2)), v[:, :4])


@pytest.mark.parametrize("variant", [*CROSS, "linear"])
def test_a_nan_pixel_stays_in_its_picture(variant):
    model, inputs = tiny.llava(), tiny.token_inputs([1, 2, 0, 1])
    asked = torch.tensor([[5, 6, 7], [8, 9, 10], [11, 12, 13], [14, 15, 16]])
    patched(model, variant, max_instruction_tokens=8)
    projector = model.model.multi_modal_projector
    clean = read_by_projector(model, projector, **inputs, instruction=asked)
    inputs["pixel_values"][2, 0, 3, 5] = float("nan")
    with torch.no_grad():
        logits = model(**inputs, instruction=asked).logits
    found = read_by_projector(model, projector, **inputs, instruction=asked)
    others = [0, 1, 3]
    assert found[2].isnan().any()
    assert same_bits(found[others], clean[others])
    assert logits[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("variant", CROSS)
def test_a_broken_patch_stays_where_the_tower_leaves_it(variant, name):
    """All pictures of a call are one sequence to Qwen's tower."""
    entry = ZOO[name]
    model = entry.model()
    batch = entry.batch([Row(images=((56, 56), (28, 84))), Row(("how many?",), images=((84, 56),), seed=2)])
    asked = torch.tensor([[5, 6, 7], [8, 9, 10]])
    patched(model, variant, visual_grid=(4, 4))
    merger = model.model.visual.merger
    clean = read_by_projector(model, merger, **batch, instruction=asked)

    def break_one(module, args, output):
        output = output.clone()
        output[5, 3] = float("nan")
        return output

    handle = model.model.visual.blocks[-1].register_forward_hook(break_one)
    found = read_by_projector(model, merger, **batch, instruction=asked)
    handle.remove()
    others = torch.arange(len(found)) != 5
    assert found.isnan().nonzero().tolist() == [[5, 3]]
    assert same_bits(found[others], clean[others])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", ["attention", "linear"])
def test_an_untrained_adapter_leaves_a_broken_tower_as_it_is(variant, dtype):
    """Half-precision towers overflow: the model's own answer stays what it was, finite or not."""
    model, inputs = tiny.llava().to(dtype), tiny.token_inputs([1, 2, 0, 1])
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)

    def overflow(module, args, output):
        output = output.clone()
        output[1, 2, 3], output[3, 1, 7] = float("inf"), float("nan")
        return output

    tower = getattr(model.model.vision_tower, "vision_model", model.model.vision_tower)
    tower.encoder.layers[-2].register_forward_hook(overflow)
    projector = model.model.multi_modal_projector
    before = read_by_projector(model, projector, **inputs)
    assert before.isinf().sum() == before.isnan().sum() == 1
    with torch.no_grad():
        logits = model(**inputs).logits
    patch_model(model, EmmaConfig(fusion=variant, inner_dim=16, num_heads=2), processor=tiny.processor())
    assert same(read_by_projector(model, projector, **inputs), before)
    with torch.no_grad():
        assert same(model(**inputs).logits, logits)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_a_picture_of_sixteen_thousand_patches_through_a_real_model(name):
    entry = ZOO[name]
    model = entry.model()
    visual = model.model.visual
    # The towers' own attention is quadratic: these blocks are theirs, and not what is asked about.
    del visual.blocks[:]
    pixels = torch.randn(16_384 + 16, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(0))
    inputs = {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 128, 128], [1, 4, 4]])}
    seen = []
    adapter = patched(model, "attention", visual_grid=(24, 24))
    visual.merger.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    with torch.no_grad():
        with adapter.disabled():
            model.model.get_image_features(**inputs)
        asked = torch.tensor([[5, 6, 7], [8, 9, 10]])
        with adapter.instruction(asked):
            model.model.get_image_features(**inputs)
    before, after = seen
    instruction = model.get_input_embeddings()(asked).detach()
    if name == "qwen2_vl":
        assert_qwen_correct(adapter, before, after, [(128, 128), (4, 4)], list(instruction))
    assert (after - before).abs().amax(-1).min() > 1e-3
    assert after.isfinite().all()
