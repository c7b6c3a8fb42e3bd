"""The fusions with ``kernel="triton"`` on CPU tensors, against the same fusions in eager PyTorch."""

from __future__ import annotations

import copy
import importlib.util
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from emma_adapter import EmmaAlignment, EmmaConfig, KernelError, Packing, patch_model
from emma_adapter.kernels.cross_attention import forward
from tests.kernels.memory_watch import watching
from tests.support import tiny
from tests.support.budget import budget

pytestmark = pytest.mark.usefixtures("poisoned_memory")

FUSIONS = ["attention", "modulation", "linear"]
D, DT, N, T = 32, 12, 18, 5
MASK = torch.tensor([[1, 1, 1, 1, 0], [0, 0, 0, 0, 0], [0, 1, 0, 1, 1]], dtype=torch.bool)


def make(fusion: str, *, kernel: str = "triton", **changes) -> EmmaAlignment:
    """As after some training: no weight is zero."""
    sizes = {"visual_dim": D, "instruction_dim": DT, "visual_grid": (3, 6), "max_instruction_tokens": T}
    sizes |= {"inner_dim": 32, "num_heads": 2, **changes}
    config = EmmaConfig(fusion=fusion, kernel=kernel, **sizes)
    torch.manual_seed(1)
    alignment = EmmaAlignment(config)
    with torch.no_grad():
        for parameter in alignment.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return alignment


def results(alignment: EmmaAlignment, v: Tensor, t: Tensor, *args, **kwargs) -> dict[str, Tensor]:
    own = copy.deepcopy(alignment)
    v, t = v.clone().requires_grad_(), t.clone().requires_grad_()
    y = own(v, t, *args, **kwargs)
    y.sin().sum().backward()
    gradients = {name: parameter.grad for name, parameter in own.named_parameters()}
    assert all(use.runs == alignment.config.kernel for use in own.kernel_report())
    return {"y": y.detach(), "v": v.grad, "t": t.grad, **gradients}


def assert_agree(fusion: str, *args, tolerance: float = 1e-4, config: dict | None = None, **kwargs) -> None:
    """Forward to 1e-5 and all gradients to ``tolerance`` of the largest value."""
    config = config or {}
    expected = results(make(fusion, kernel="eager", **config), *args, **kwargs)
    found = results(make(fusion, **config), *args, **kwargs)
    for name, value in expected.items():
        scale = value.abs().max().clamp_min(1e-6)
        assert (found[name] - value).abs().max() <= (1e-5 if name == "y" else tolerance) * scale, name


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("masked", [True, False], ids=["mask", "no-mask"])
def test_agrees_with_eager(fusion, masked):
    assert_agree(fusion, torch.randn(3, N, D), torch.randn(3, T, DT), MASK if masked else None)


@pytest.mark.parametrize("fusion", ["attention", "modulation"])
def test_agrees_with_eager_on_another_grid(fusion):
    assert_agree(fusion, torch.randn(1, 8, D), torch.randn(1, T, DT), grid=(2, 4))


def test_linear_reads_the_first_columns_of_its_weights():
    assert_agree("linear", torch.randn(2, N, D), torch.randn(2, 3, DT))


@settings(max_examples=budget(2, 5))
@given(data=st.data())
def test_packed_agrees_with_eager(data):
    """Several grids, in any order, with tokens in an order of their own, and instructions shared or unused."""
    fusion = data.draw(st.sampled_from(["attention", "modulation"]))
    grids = data.draw(st.lists(st.sampled_from([(3, 6), (2, 4), (1, 1)]), min_size=1, max_size=4))
    rows = [data.draw(st.integers(0, 2)) for _ in grids]
    ordered = data.draw(st.booleans())
    orders = {grid: torch.randperm(grid[0] * grid[1]) for grid in grids} if ordered else None
    positions = data.draw(st.booleans())
    config = {} if positions else {"visual_grid": None}
    v = torch.randn(sum(h * w for h, w in grids), D)
    packing = Packing(grids, torch.tensor(rows), orders)
    assert_agree(fusion, v, torch.randn(3, T, DT), MASK, packing=packing, config=config)


@settings(max_examples=budget(3, 6))
@given(data=st.data())
def test_programs_stay_inside_their_tensors_and_do_not_meet(data):
    """Forward and backward; sizes with ragged edges, more than one tile, and images without tokens in between."""
    fusion = data.draw(st.sampled_from(FUSIONS))
    number, length = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 35))
    width, heads = data.draw(st.sampled_from([16, 80])), data.draw(st.sampled_from([(1, 16), (2, 24), (3, 48)]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    sizes = {"inner_dim": heads[0] * heads[1], "num_heads": heads[0], "max_instruction_tokens": length}
    alignment = make(fusion, visual_dim=width, visual_grid=(1, number), **sizes)
    t = torch.randn(2, length, DT, dtype=dtype)
    mask = torch.rand(2, length) < 0.7
    with watching() as watch:
        v = torch.randn(2, number, width, dtype=dtype, requires_grad=True)
        alignment(v, t, mask).float().sum().backward()
        if fusion != "linear":
            grids = [(1, number), (3, 7), (1, 1), (5, 14)]
            packed = torch.randn(number + 21 + 1 + 70, width, dtype=dtype, requires_grad=True)
            packing = Packing(grids, torch.tensor([1, 0, 0, 1]))
            alignment(packed, t, mask, packing=packing).float().sum().backward()
    assert watch.launches >= 5
    assert watch.problems == set()


@pytest.mark.parametrize(
    ("mask", "replacement", "what"),
    [
        ("row_inside = rows < M", "row_inside = rows < M + 1", "outside"),
        ("tl.program_id(0) // channel_programs * BLOCK_M", "tl.program_id(0) * 0", "written twice"),
    ],
)
def test_a_broken_kernel_is_seen(mask, replacement, what, monkeypatch, tmp_path):
    """The watch finds a mask that is one too wide, and programs that write to the same place."""
    source = Path(forward.__file__).read_text()
    start = source.index("def output_forward(")
    start = source.rindex("@triton.jit", 0, start)
    kernel = source[start : source.index("# --- host")]
    assert mask in kernel
    broken = tmp_path / "broken.py"
    broken.write_text(
        "import triton\nimport triton.language as tl\nfrom emma_adapter.kernels.launch import dot, rounded\n"
        "from emma_adapter.kernels.cross_attention.tiles import *\n\n" + kernel.replace(mask, replacement)
    )
    spec = importlib.util.spec_from_file_location("broken", broken)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(forward, "output_forward", module.output_forward)
    with watching() as watch, torch.no_grad():
        make("attention")(torch.randn(3, 30, D), torch.randn(3, T, DT), grid=(5, 6))
    assert {(name, problem.startswith(what)) for name, _, problem in watch.problems} >= {("output_forward", True)}


@pytest.mark.parametrize("fusion", FUSIONS)
def test_no_images(fusion):
    packing = Packing([], torch.zeros(0, dtype=torch.long))
    assert make(fusion)(torch.zeros(0, D), torch.randn(2, T, DT), None, packing=packing).shape == (0, D)
    assert make(fusion)(torch.zeros(0, N, D), torch.zeros(0, T, DT)).shape == (0, N, D)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_nan_in_padding_stays_there(fusion):
    alignment, v, t = make(fusion), torch.randn(3, N, D), torch.randn(3, T, DT)
    clean = results(alignment, v, t, MASK)
    found = results(alignment, v, t.masked_fill(~MASK[..., None], float("nan")), MASK)
    for name in clean:
        assert found[name].isfinite().all(), name
        assert torch.equal(found[name], clean[name]), name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fusion", FUSIONS)
def test_compiles_without_graph_breaks(fusion):
    alignment, v, t = make(fusion), torch.randn(3, N, D), torch.randn(3, T, DT)
    expected = alignment(v, t, MASK)
    compiled = torch.compile(alignment, fullgraph=True, backend="aot_eager")
    assert (compiled(v, t, MASK) - expected).abs().max() <= 1e-6
    runs = {(use.runs, use.shape is None) for use in alignment.kernel_report()}
    assert runs == {("triton", False), ("triton", True)}


@pytest.mark.parametrize("fusion", FUSIONS)
def test_gradients_accumulate(fusion):
    alignment, v, t = make(fusion), torch.randn(4, N, D), torch.randn(4, T, DT)
    alignment(v, t).square().mean().backward()
    whole = {name: parameter.grad.clone() for name, parameter in alignment.named_parameters()}
    alignment.zero_grad()
    for half in (slice(0, 2), slice(2, 4)):
        (alignment(v[half], t[half]).square().mean() / 2).backward()
    for name, parameter in alignment.named_parameters():
        assert (parameter.grad - whole[name]).abs().max() <= 1e-5 * whole[name].abs().max(), name


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("recompute", ["reentrant", "non-reentrant"])
def test_recomputation_gives_the_same_gradients(fusion, recompute):
    from torch.utils.checkpoint import checkpoint

    alignment, v, t = make(fusion), torch.randn(2, N, D, requires_grad=True), torch.randn(2, T, DT)
    alignment(v, t).sin().sum().backward()
    plain = {name: parameter.grad.clone() for name, parameter in alignment.named_parameters()}
    alignment.zero_grad()
    checkpoint(alignment, v, t, use_reentrant=recompute == "reentrant").sin().sum().backward()
    assert all(torch.equal(parameter.grad, plain[name]) for name, parameter in alignment.named_parameters())


@pytest.mark.parametrize("fusion", FUSIONS)
def test_under_autocast(fusion):
    alignment, v, t = make(fusion), torch.randn(2, N, D), torch.randn(2, T, DT)
    expected = alignment(v, t)
    with torch.autocast("cpu", torch.bfloat16):
        found = alignment(v, t)
        found.sum().backward()
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() <= 2e-2 * expected.abs().max()
    assert all(parameter.grad.isfinite().all() for parameter in alignment.parameters())


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_patched_model_is_unchanged_and_then_trains(fusion):
    """Width and heads of a real model in miniature: identity, generate, and a step of training."""
    model, inputs = tiny.llava(), tiny.token_inputs([1, 0, 2])
    asked = torch.tensor([[5, 6], [7, 8], [9, 10]])
    with torch.no_grad():
        original = model(**inputs).logits
    sizes = {"max_instruction_tokens": 16, "inner_dim": 32, "num_heads": 2}
    adapter = patch_model(model, EmmaConfig(fusion=fusion, kernel="triton", **sizes))
    with torch.no_grad():
        assert torch.equal(model(**inputs, instruction=asked).logits, original)
    adapter.train_only()
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.3)
    model.train()(**inputs, instruction=asked).logits.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in adapter.parameters())
    assert {use.runs for use in adapter.kernel_report()} == {"triton"}


def test_what_a_call_cannot_have_says_why():
    with pytest.raises(KernelError, match=r"multiple of 16.*kernel=\"eager\""):
        make("attention", visual_dim=D + 1)(torch.randn(1, N, D + 1), torch.randn(1, T, DT))
    with pytest.raises(KernelError, match="float64"):
        make("modulation")(torch.randn(1, N, D).double(), torch.randn(1, T, DT))
    with pytest.raises(KernelError, match="rank"):
        make("linear", rank=2)(torch.randn(1, N, D), torch.randn(1, T, DT))
    with pytest.raises(KernelError, match=r"native grid \(3, 6\)"):
        make("linear")(torch.randn(1, 8, D), torch.randn(1, T, DT), grid=(2, 4))


class Copies(TorchDispatchMode):
    """Tensors that are made of numbers of the host, or change their dtype from float64, which nothing on a GPU has."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        wide = any(isinstance(own, Tensor) and own.dtype == torch.float64 for own in args)
        if name.startswith("lift_fresh") or (name == "_to_copy" and wide):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("ordered", [False, True])
def test_packed_images_of_known_grids_take_nothing_from_the_host(ordered):
    """What a GPU would have to be waited for, and what no CUDA graph can hold."""
    alignment, t = make("modulation"), torch.randn(3, T, DT)
    grids = [(3, 6), (2, 4), (5, 3), (2, 4)]
    orders = {grid: torch.randperm(grid[0] * grid[1]) for grid in grids} if ordered else None
    packing = Packing(grids, torch.tensor([0, 2, 1, 1]), orders)
    v = torch.randn(sum(h * w for h, w in grids), D)
    first = alignment(v, t, MASK, packing=packing)
    with Copies() as copies:
        again = alignment(v, t, MASK, packing=packing)
        again.sum().backward()
    assert copies.found == []
    assert torch.equal(first, again)
    # Of other images, the lengths alone, in memory that is sent without waiting.
    with Copies() as copies:
        alignment(v, t, MASK, packing=Packing(grids[::-1], torch.tensor([0, 2, 1, 1]), orders))
    assert "_to_copy" not in copies.found
    with torch.inference_mode():
        alignment(v, t, MASK, packing=(later := Packing(grids, torch.tensor([0, 2, 1, 1]), orders)))
    alignment(v, t, MASK, packing=later).sum().backward()
    copied = pickle.loads(pickle.dumps(packing))
    assert torch.equal(alignment(v, t, MASK, packing=copied), first)
