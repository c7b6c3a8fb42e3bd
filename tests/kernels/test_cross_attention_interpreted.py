"""The kernels of cross-attention on CPU tensors, against the formula in float64 and against the eager fusions."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from emma_adapter import EmmaAlignment, EmmaConfig, KernelError, ShapeError
from emma_adapter.kernels.cross_attention import (
    cross_attention,
    cross_attention_reference,
    forward,
    tiles,
    unsupported_reason,
)
from emma_adapter.kernels.cross_attention.gradients import cross_attention_backward
from emma_adapter.kernels.cross_attention.op import _cross_attention
from tests.kernels.precision import BITS, DTYPES, TOLERANCES
from tests.support.budget import budget

pytestmark = pytest.mark.usefixtures("poisoned_memory")

EPILOGUES = ["add", "modulate"]
SMALL = {"BLOCK_M": 16, "BLOCK_D": 16, "BLOCK_I": 16, "BLOCK_T": 16, "CHUNK": 32}

every_dtype = pytest.mark.parametrize("dtype", budget([torch.float32, torch.bfloat16], DTYPES), ids=str)
every_epilogue = pytest.mark.parametrize("epilogue", EPILOGUES)


@pytest.fixture
def small_tiles(monkeypatch):
    """So that small problems, which the interpreter needs, have several tiles in every direction."""
    for blocks in tiles.BLOCKS.values():
        for name, size in SMALL.items():
            monkeypatch.setitem(blocks, name, size)
    monkeypatch.setattr(forward, "MANY_PROGRAMS", 2)
    tiles.configuration.cache_clear()
    yield
    tiles.configuration.cache_clear()


@dataclass
class Problem:
    """Arguments of :func:`cross_attention`; ``tensors`` are those that have gradients."""

    tensors: dict[str, Tensor]
    fixed: dict[str, object]
    key_mask: Tensor | None = None
    seed: int = 0
    gradients: dict[str, Tensor] = field(default_factory=dict)

    def run(self, function, dtype: torch.dtype, weight_dtype: torch.dtype | None = None) -> Tensor:
        """The result; and all gradients, for a fixed gradient of the result."""
        leaves = {}
        for name, tensor in self.tensors.items():
            own = dtype if name in ("visual_tokens", "key", "value") else weight_dtype or dtype
            leaves[name] = tensor.detach().to(own).requires_grad_()
        y = function(**leaves, key_mask=self.key_mask, **self.fixed)
        generator = torch.Generator().manual_seed(self.seed)
        y.backward(torch.randn(y.shape, generator=generator).to(y.dtype))
        # Where no image has an instruction, the formula reads no weight, and PyTorch has no gradient of it.
        self.gradients = {
            name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()
        }
        assert all(self.gradients[name].shape == leaf.shape for name, leaf in leaves.items())
        assert all(self.gradients[name].dtype == leaf.dtype for name, leaf in leaves.items())
        return y.detach()


def make(
    lengths=(21, 21, 21),
    *,
    dtype=torch.float32,
    packed=False,
    width=48,
    heads=2,
    head_dim=16,
    keys=5,
    instructions=3,
    rows=None,
    mask=None,
    positions=True,
    epilogue="add",
    visual="plain",
    seed=0,
) -> Problem:
    """Values that ``dtype`` holds exactly, so that all that is computed from them starts from the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    inner = heads * head_dim

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(dtype).float()

    x = normal(sum(lengths), width)
    if visual == "outlier":
        x[:, 3 % width] *= 1e3
    elif visual == "outlier-first":
        x[:, 0] *= 1e3
    elif visual == "shifted":
        # A mean of a hundred to two thousand standard deviations.
        x = (x + {torch.float32: 2000.0}.get(dtype, 100.0)).to(dtype).float()
    fixed = {"num_heads": heads, "epilogue": epilogue}
    tensors = {
        "visual_tokens": x if packed else x.view(len(lengths), -1, width),
        "key": normal(instructions, keys, inner),
        "value": normal(instructions, keys, inner),
        "norm_weight": 1 + normal(width, scale=0.125),
        "norm_bias": normal(width, scale=0.1),
        "query_weight": normal(inner, width, scale=width**-0.5),
        "query_bias": normal(inner, scale=0.1),
        "output_weight": normal(width, inner, scale=inner**-0.5),
        "output_bias": normal(width, scale=0.1),
    }
    tensors["norm_weight"] = tensors["norm_weight"].to(dtype).float()
    if packed:
        fixed["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0)
    if positions:
        tensors["position"] = normal(max(lengths, default=0) + (2 if packed else 0), inner)
        if packed:
            fixed["position_start"] = torch.tensor([index % 3 for index in range(len(lengths))])
    if rows is not None or instructions != len(lengths):
        rows = [index % instructions for index in range(len(lengths))] if rows is None else rows
        fixed["instruction_rows"] = torch.tensor(rows)
    return Problem(tensors, fixed, None if mask is None else torch.tensor(mask, dtype=torch.bool), seed)


def distance(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    if not expected.numel():
        return 0.0
    return ((found.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-6)).item()


def assert_correct(problem: Problem, dtype: torch.dtype) -> None:
    """Within the tolerances of the float64 reference, and not worse than twice the same formula in PyTorch."""
    found, gradients = problem.run(cross_attention, dtype, torch.float32), problem.gradients
    eager, eager_gradients = problem.run(cross_attention_reference, dtype), problem.gradients
    expected, exact = problem.run(cross_attention_reference, torch.float64), problem.gradients
    forward, backward = TOLERANCES[dtype]
    rounding = torch.finfo(dtype).eps
    assert found.isfinite().all()
    assert distance(found, expected) <= forward
    error, eager_error = distance(found, expected), distance(eager, expected)
    if error > 2 * eager_error + rounding:
        eager_error = max(eager_error, eager_error_nearby(problem, dtype))
    assert error <= 2 * eager_error + rounding, (error, eager_error)
    scale = max(gradient.abs().max().item() if gradient.numel() else 0.0 for gradient in exact.values())
    for name, gradient in exact.items():
        assert gradients[name].isfinite().all(), name
        if not gradient.numel() or gradient.abs().max() < 1e-9 * scale:
            continue
        error, eager_error = distance(gradients[name], gradient), distance(eager_gradients[name], gradient)
        # Where the formula itself is as far off in this dtype, as beside an outlier, it is the measure.
        assert error <= max(backward, 2 * eager_error), (name, error, eager_error)
        if error > 2 * eager_error + 2 * rounding:
            eager_error = max(eager_error, eager_error_nearby(problem, dtype, name))
        assert error <= 2 * eager_error + 2 * rounding, (name, error, eager_error)


def eager_error_nearby(problem: Problem, dtype: torch.dtype, name: str | None = None) -> float:
    """The largest error of PyTorch's gradient, or of its result, over problems that differ in their last bits. A
    gradient that is all in one number, as that of the norm's scale beside an outlier, has an error that is small by
    chance now and then: of 1.7e-7 in one problem, and 1.8e-6 one bit beside it. So has the result for a few tokens."""
    errors = []
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        steps = {
            key: torch.randint(-2, 3, tensor.shape, generator=generator) for key, tensor in problem.tensors.items()
        }
        nearby = {
            key: (tensor * (1 + torch.finfo(dtype).eps * steps[key])).to(dtype).float()
            for key, tensor in problem.tensors.items()
        }
        other = replace(problem, tensors=nearby)
        both = []
        for own in (dtype, torch.float64):
            result = other.run(cross_attention_reference, own)
            both.append(result if name is None else other.gradients[name])
        errors.append(distance(*both))
    return max(errors)


def same_bits(left: Tensor, right: Tensor) -> bool:
    return torch.equal(left.contiguous().view(BITS[left.dtype]), right.contiguous().view(BITS[right.dtype]))


# --- the formula -----------------------------------------------------------------------------------------------

MASK = [[1, 1, 1, 1, 0], [0, 0, 0, 0, 0], [0, 1, 0, 1, 1]]
PROBLEMS = {
    "dense": {"mask": MASK},
    "packed": {"lengths": (40, 0, 5, 1, 17), "packed": True, "mask": MASK, "rows": [2, 0, 1, 0, 2]},
    "one-row": {"lengths": (1,), "instructions": 1, "keys": 1},
    "one-key": {"lengths": (18, 18), "instructions": 2, "keys": 1, "head_dim": 48, "heads": 1},
    "empty-at-both-ends": {"lengths": (0, 19, 0, 0), "packed": True, "instructions": 2},
    "many-keys": {"lengths": (17,), "instructions": 1, "keys": 37, "width": 16, "heads": 1, "head_dim": 32},
    "outlier": {"visual": "outlier", "mask": MASK, "width": 64},
    "shifted": {"visual": "shifted", "positions": False},
    "tiles-of-one-image": {"lengths": (9,) * 5, "rows": [1, 1, 0, 1, 0], "instructions": 2, "positions": False},
    "heads-of-24": {"lengths": (9, 9), "instructions": 2, "head_dim": 24, "heads": 2},
    "outlier-first": {"visual": "outlier-first", "mask": MASK, "width": 64},
}


@pytest.mark.parametrize(("index", "name"), list(enumerate(PROBLEMS)))
def test_formula(index, name):
    dtype, epilogue = DTYPES[index % 3], EPILOGUES[index // 3 % 2]
    assert_correct(make(**PROBLEMS[name], epilogue=epilogue, dtype=dtype), dtype)


@every_dtype
@every_epilogue
def test_formula_in_every_dtype(epilogue, dtype):
    assert_correct(make((6, 6, 6), mask=MASK, epilogue=epilogue, dtype=dtype), dtype)


@pytest.mark.parametrize(("seed", "visual"), [(20, "outlier"), (10, "outlier"), (16, "outlier-first")])
def test_a_gradient_that_is_all_in_one_number(seed, visual):
    """That of the norm's scale, beside an outlier: where PyTorch happens to be nearly exact, once."""
    epilogue = "modulate" if seed == 20 else "add"
    problem = make((3,), width=48, instructions=1, epilogue=epilogue, visual=visual, seed=seed)
    assert_correct(problem, torch.float32)


def test_a_nearly_certain_choice():
    """Gradients of scores are then small differences, in which the rounding of the softmax's sum must not show."""
    assert_correct(make((1,), width=16, heads=1, keys=3, instructions=1, seed=7), torch.float32)


@pytest.mark.usefixtures("small_tiles")
@every_epilogue
def test_formula_over_several_tiles(epilogue):
    """In every direction: tokens, channels, inner width and keys, and tokens summed at once."""
    lengths = (35, 0, 3)
    problem = make(lengths, packed=True, width=32, heads=2, head_dim=16, keys=17, epilogue=epilogue)
    assert_correct(problem, torch.float32)


def test_formula_with_more_heads_and_channels_than_a_tile():
    problem = make((66, 0, 3), packed=True, width=80, heads=3, head_dim=48, keys=33, dtype=torch.bfloat16)
    assert_correct(problem, torch.bfloat16)


@st.composite
def problems(draw):
    dtype = draw(st.sampled_from(DTYPES))
    packed = draw(st.booleans())
    if packed:
        lengths = tuple(draw(st.lists(st.integers(0, 20), min_size=1, max_size=3)))
        lengths = lengths if sum(lengths) else (1,)
    else:
        lengths = (draw(st.integers(1, 19)),) * draw(st.integers(1, 3))
    instructions, keys = draw(st.integers(1, 3)), draw(st.integers(1, 20))
    row = st.lists(st.booleans(), min_size=keys, max_size=keys)
    return dtype, make(
        lengths,
        dtype=dtype,
        packed=packed,
        width=16 * draw(st.integers(1, 3)),
        heads=draw(st.integers(1, 2)),
        head_dim=draw(st.sampled_from([16, 32, 48, 64])),
        keys=keys,
        instructions=instructions,
        rows=[draw(st.integers(0, instructions - 1)) for _ in lengths],
        mask=draw(st.none() | st.lists(row, min_size=instructions, max_size=instructions)),
        positions=draw(st.booleans()),
        epilogue=draw(st.sampled_from(EPILOGUES)),
        visual=draw(st.sampled_from(["plain", "outlier", "outlier-first", "shifted"])),
        seed=draw(st.integers(0, 99)),
    )


@settings(max_examples=budget(3, 6))
@given(drawn=problems())
def test_formula_of_any_problem(drawn):
    dtype, problem = drawn
    assert_correct(problem, dtype)


@pytest.mark.parametrize("visual", ["outlier", "outlier-first", "shifted"])
@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_queries_are_exact_whatever_the_visual_tokens_are_like(visual, scale):
    """LayerNorm subtracts nearly equal numbers: one channel of a thousand, or a mean of two thousand deviations."""
    problem = make((9, 9, 9), width=1024, visual=visual, positions=False)
    problem.tensors["visual_tokens"] *= scale
    packed = {**problem.tensors, "visual_tokens": problem.tensors["visual_tokens"].flatten(0, 1)}
    problem.tensors, problem.fixed["cu_seqlens"] = packed, torch.tensor([0, 9, 18, 27])
    with torch.no_grad():
        query = _cross_attention(*operands(problem, requires_grad=False))[1]
    t = {name: tensor.double() for name, tensor in problem.tensors.items()}
    normed = torch.nn.functional.layer_norm(t["visual_tokens"], (1024,), t["norm_weight"], t["norm_bias"], 1e-5)
    assert distance(query, normed @ t["query_weight"].T + t["query_bias"]) <= 1e-6


# --- identity --------------------------------------------------------------------------------------------------


@every_dtype
@every_epilogue
def test_an_untrained_output_is_the_identity(epilogue, dtype):
    problem = make(dtype=dtype, epilogue=epilogue)
    for name in ("output_weight", "output_bias"):
        problem.tensors[name].zero_()
    x = problem.tensors["visual_tokens"]
    x[torch.rand(x.shape) < 0.3] = -0.0
    assert same_bits(problem.run(cross_attention, dtype), x.to(dtype))


@every_dtype
@every_epilogue
def test_tokens_without_an_instruction_pass_through(epilogue, dtype):
    problem = make(dtype=dtype, epilogue=epilogue, mask=MASK)
    x = problem.tensors["visual_tokens"]
    x[1, 0] = -0.0
    x[1, 1] = float("nan")
    y = problem.run(cross_attention, dtype)
    assert same_bits(y[1].nan_to_num(7), x[1].to(dtype).nan_to_num(7))
    gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(problem.seed)).to(dtype)
    assert same_bits(problem.gradients["visual_tokens"][1], gradient[1])
    assert problem.gradients["key"][1].eq(0).all()
    assert problem.gradients["value"][1].eq(0).all()
    assert all(value.isfinite().all() for value in problem.gradients.values())


@every_epilogue
def test_without_any_instruction_weights_have_no_gradient(epilogue):
    problem = make(epilogue=epilogue, mask=[[0] * 5] * 3)
    problem.run(cross_attention, torch.float32)
    assert all(value.eq(0).all() for name, value in problem.gradients.items() if name != "visual_tokens")


# --- what must not spread --------------------------------------------------------------------------------------


@every_dtype
def test_what_padding_holds_is_not_read(dtype):
    problem = make(dtype=dtype, mask=MASK)
    clean, gradients = problem.run(cross_attention, dtype), problem.gradients
    for name in ("key", "value"):
        problem.tensors[name][~problem.key_mask] = float("nan")
    assert same_bits(problem.run(cross_attention, dtype), clean)
    assert all(same_bits(problem.gradients[name], gradient) for name, gradient in gradients.items())
    assert problem.gradients["key"][~problem.key_mask].eq(0).all()


def test_the_same_bits_every_time():
    problem = make((33, 0, 3, 16), packed=True, rows=[0, 1, 0, 1], instructions=2, width=16, epilogue="modulate")
    first, gradients = problem.run(cross_attention, torch.float32), problem.gradients
    assert same_bits(problem.run(cross_attention, torch.float32), first)
    assert all(same_bits(problem.gradients[name], gradient) for name, gradient in gradients.items())


@pytest.mark.usefixtures("small_tiles")
def test_dense_is_packed_of_equal_lengths():
    dense = make((11, 11, 11), mask=MASK, width=16)
    packed = copy.deepcopy(dense)
    packed.tensors["visual_tokens"] = packed.tensors["visual_tokens"].flatten(0, 1)
    packed.fixed["cu_seqlens"] = torch.tensor([0, 11, 22, 33], dtype=torch.int32)
    y = dense.run(cross_attention, torch.float32)
    assert same_bits(packed.run(cross_attention, torch.float32), y.flatten(0, 1))
    for name, gradient in dense.gradients.items():
        assert distance(packed.gradients[name].view_as(gradient), gradient.double()) <= 1e-6, name


def test_inputs_need_not_be_contiguous_or_aligned():
    problem = make((3, 3, 3), width=16)
    expected, gradients = problem.run(cross_attention, torch.float32), problem.gradients

    def strided(tensor: Tensor) -> Tensor:
        return tensor.mT.contiguous().mT if tensor.ndim > 1 else torch.stack([tensor, tensor], -1)[:, 0]

    def shifted(tensor: Tensor) -> Tensor:
        return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)

    for change in (strided, shifted):

        def changed(change=change, **arguments):
            return cross_attention(**{**arguments, **{name: change(arguments[name]) for name in problem.tensors}})

        y = problem.run(changed, torch.float32)
        assert same_bits(y, expected)
        for name, gradient in gradients.items():
            assert same_bits(problem.gradients[name], gradient), name


# --- what is computed and kept ---------------------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch):
    names = []
    launch = tiles.Configuration.launch

    def recorded(self, *args, **kwargs):
        names.append(self.kernel.fn.__name__)
        launch(self, *args, **kwargs)

    monkeypatch.setattr(tiles.Configuration, "launch", recorded)
    return names


def test_no_gradient_is_computed_that_nobody_asked_for(launched):
    problem = make((5, 5, 5))

    def kernels(*needed: str) -> set[str]:
        launched.clear()
        leaves = {name: t.clone().requires_grad_(name in needed) for name, t in problem.tensors.items()}
        cross_attention(**leaves, **problem.fixed).sum().backward()
        assert {name for name, leaf in leaves.items() if leaf.grad is not None} == set(needed)
        return set(launched) - {"query_forward", "attention_forward", "output_forward", "output_backward"}

    weights = {"query_backward", "query_weight_backward", "output_weight_backward"}
    instruction = {"query_backward", "key_value_backward", "key_value_sum"}
    assert kernels(*(set(problem.tensors) - {"visual_tokens"})) == weights | instruction
    assert kernels("visual_tokens") == {"query_backward", "visual_backward"}
    assert kernels("key") == instruction
    assert kernels("output_bias") == weights


@every_epilogue
def test_little_is_kept_for_backward(epilogue):
    """At most a fifth of what autograd keeps of the eager fusion, visual tokens and parameters apart."""
    width, inner, tokens = 512, 64, 40
    problem = make(
        (tokens,), dtype=torch.bfloat16, width=width, heads=2, head_dim=32, instructions=1, epilogue=epilogue
    )

    def kept(forward, *own: Tensor) -> int:
        sizes: dict[int, int] = {}
        known = {tensor.untyped_storage().data_ptr() for tensor in own}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = forward()
        assert y.requires_grad
        return sum(sizes.values())

    leaves = {
        name: tensor.to(torch.bfloat16 if name in ("visual_tokens", "key", "value") else torch.float32)
        for name, tensor in problem.tensors.items()
    }
    leaves = {name: tensor.requires_grad_(name != "visual_tokens") for name, tensor in leaves.items()}
    fused = kept(lambda: cross_attention(**leaves, **problem.fixed), *leaves.values())

    fusion = {"add": "attention", "modulate": "modulation"}[epilogue]
    config = EmmaConfig(fusion=fusion, visual_dim=width, instruction_dim=12, inner_dim=inner, num_heads=2)
    alignment, v = EmmaAlignment(config), leaves["visual_tokens"]
    eager = kept(lambda: alignment(v, torch.randn(1, 5, 12)), v, *alignment.parameters())
    assert fused <= tokens * (2 * inner * 2 + 16) + 2048
    assert fused <= eager / 5


# --- as an operator of PyTorch ---------------------------------------------------------------------------------


def operands(problem: Problem, *, requires_grad: bool = True) -> tuple:
    """The arguments of the operator itself."""
    t = {name: x.clone().requires_grad_(requires_grad) for name, x in problem.tensors.items()}
    cu_seqlens = problem.fixed["cu_seqlens"].int()
    names = ("norm_weight", "norm_bias", "query_weight", "query_bias", "position")
    return (
        *(t["visual_tokens"], t["key"], t["value"], torch.ones(t["key"].shape[:2], dtype=torch.bool)),
        *(torch.arange(len(cu_seqlens) - 1, dtype=torch.int32), cu_seqlens, *(t.get(name) for name in names)),
        problem.fixed["position_start"].int() if "position_start" in problem.fixed else None,
        *(t["output_weight"], t["output_bias"], None, len(cu_seqlens) - 1, problem.fixed["num_heads"], 1e-5),
        problem.fixed["epilogue"] == "modulate",
    )


@pytest.mark.parametrize("positions", budget([True], [True, False]))
@pytest.mark.filterwarnings("ignore")
def test_the_operators_pass_pytorchs_own_checks(positions):
    problem = make((5, 0, 4), packed=True, positions=positions, width=16, heads=1, epilogue="modulate")
    torch.library.opcheck(_cross_attention, operands(problem))
    plain = operands(problem, requires_grad=False)
    with torch.no_grad():
        y, *intermediates = _cross_attention(*plain)
    without_bias = (*plain[:9], *plain[10:15])
    torch.library.opcheck(
        cross_attention_backward,
        (torch.randn_like(y), *without_bias, *intermediates, plain[15], plain[16], plain[18], True, True, True),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.filterwarnings("ignore")
def test_the_operators_pass_pytorchs_own_checks_for_images_of_one_size():
    """Which need neither lengths nor rows."""
    problem = make((4, 4), packed=True, positions=False, instructions=2, width=16, heads=1)
    dense = list(operands(problem))
    packed, dense[4:6] = tuple(dense), (None, None)
    torch.library.opcheck(_cross_attention, tuple(dense))
    assert same_bits(_cross_attention(*dense)[0], _cross_attention(*packed)[0])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("packed", budget([True], [False, True]), ids=str)
def test_compiles_without_graph_breaks(packed):
    problem = make((6, 6), packed=packed, instructions=2, width=16, mask=MASK[:2])
    expected, gradients = problem.run(cross_attention, torch.float32), problem.gradients
    compiled = torch.compile(cross_attention, fullgraph=True, backend="aot_eager", dynamic=True)
    assert same_bits(problem.run(compiled, torch.float32), expected)
    assert all(same_bits(problem.gradients[name], gradient) for name, gradient in gradients.items())


def test_autocast_and_no_grad_change_nothing():
    problem = make((6, 6), instructions=2, width=16)
    expected, gradients = problem.run(cross_attention, torch.float32), problem.gradients
    with torch.autocast("cpu", torch.bfloat16):
        assert same_bits(problem.run(cross_attention, torch.float32), expected)
    assert all(same_bits(problem.gradients[name], gradient) for name, gradient in gradients.items())
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert same_bits(cross_attention(**problem.tensors, **problem.fixed), expected)


@every_epilogue
@pytest.mark.parametrize("shape", [(0, 7), (3, 0)], ids=str)
def test_no_tokens(epilogue, shape):
    problem = make((1, 1, 1), epilogue=epilogue, positions=False, instructions=3)
    problem.tensors["visual_tokens"] = torch.zeros(*shape, 48)
    for name in ("key", "value"):
        problem.tensors[name] = problem.tensors[name][: shape[0]]
    assert problem.run(cross_attention, torch.float32).shape == (*shape, 48)
    assert all(gradient.eq(0).all() for gradient in problem.gradients.values())


# --- misfits ---------------------------------------------------------------------------------------------------

MISFITS = {
    "keys": ({"key": torch.zeros(3, 0, 32)}, "at least one key"),
    "packed-without-lengths": ({"visual_tokens": torch.zeros(63, 48)}, "cu_seqlens"),
    "value": ({"value": torch.zeros(3, 4, 32)}, "value must be"),
    "mask": ({"key_mask": torch.ones(3, 4)}, "key_mask must be"),
    "weight": ({"query_weight": torch.zeros(48, 32)}, "query_weight must be"),
    "positions": ({"position": torch.zeros(20, 32)}, "21 visual tokens"),
    "instructions": ({"key": torch.zeros(2, 5, 32), "value": torch.zeros(2, 5, 32)}, "need instruction_rows"),
    "rows": ({"instruction_rows": torch.zeros(2, dtype=torch.long)}, "instruction_rows must be"),
}


@pytest.mark.parametrize(("change", "message"), MISFITS.values(), ids=MISFITS)
def test_misfits_are_shape_errors(change, message):
    problem = make()
    with pytest.raises(ShapeError, match=message):
        cross_attention(**{**problem.tensors, **problem.fixed, **change})


def test_what_is_supported():
    x = torch.zeros(1, 2, 48)
    assert unsupported_reason(x, 32, 2) is None
    assert "at most 512" in unsupported_reason(x, 1024, 16)


REFUSED = {
    "inner-width": ({"num_heads": 2, "key": torch.zeros(3, 5, 40), "value": torch.zeros(3, 5, 40)}, "multiple of 16"),
    "dtype": ({"visual_tokens": torch.zeros(3, 21, 48, dtype=torch.float64)}, "float64"),
    "width": ({"visual_tokens": torch.zeros(3, 21, 40)}, "multiple of 16"),
    "heads": ({"num_heads": 4}, "heads of 16 to 64"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_the_kernels_cannot_compute(change, message):
    problem = make()
    with pytest.raises(KernelError, match=message):
        cross_attention(**{**problem.tensors, **problem.fixed, **change})


def test_an_unknown_epilogue():
    with pytest.raises(ValueError, match="'modulation'"):
        make(epilogue="modulation").run(cross_attention, torch.float32)


@pytest.mark.parametrize("row", [-4, 3])
def test_an_instruction_that_does_not_exist(row):
    with pytest.raises(IndexError):
        make(rows=[0, row, 1]).run(cross_attention, torch.float32)


def test_negative_rows_count_from_the_end_as_in_pytorch():
    expected = make(rows=[2, 0, 1]).run(cross_attention, torch.float32)
    assert same_bits(make(rows=[-1, 0, -2]).run(cross_attention, torch.float32), expected)


def test_forward_mode_is_refused():
    problem = make()
    x = problem.tensors.pop("visual_tokens")
    for function in (
        lambda: torch.func.jvp(lambda v: cross_attention(v, **problem.tensors, **problem.fixed), (x,), (x,)),
        lambda: torch.func.jacfwd(lambda v: cross_attention(v, **problem.tensors, **problem.fixed))(x),
    ):
        with pytest.raises(KernelError, match="forward-mode"):
            function()
