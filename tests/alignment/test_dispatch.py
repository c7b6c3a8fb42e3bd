"""Which implementation runs, and what is said about it; the kernels themselves are tested in ``kernels/``."""

from __future__ import annotations

import copy
import json
import pickle
import sys

import pytest
import torch
from torch import Tensor

from emma_adapter import (
    ConfigError,
    EmmaAlignment,
    EmmaConfig,
    EmmaError,
    Fusion,
    KernelError,
    Packing,
    load_adapter,
    patch_model,
    register_fusion,
)
from emma_adapter.alignment.fusion import dispatch, registry
from emma_adapter.kernels import measured
from tests.support import tiny

FUSIONS = ["attention", "linear", "modulation"]
SIZES = {"visual_dim": 16, "instruction_dim": 6, "visual_grid": (2, 3), "max_instruction_tokens": 4}


def make(fusion: str, kernel: str = "auto") -> EmmaAlignment:
    return EmmaAlignment(EmmaConfig(fusion=fusion, kernel=kernel, inner_dim=32, num_heads=2, **SIZES))


def tokens(batch: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 6, 16), torch.randn(batch, 4, 6)


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize(("kernel", "reason"), [("auto", "on the CPU"), ("eager", 'kernel="eager"')])
def test_on_the_cpu_pytorch_runs_and_says_so(fusion, kernel, reason):
    alignment = make(fusion, kernel)
    assert alignment.kernel_report() == ()
    alignment(*tokens(2))
    alignment(*tokens(3))
    (use,) = alignment.kernel_report()
    assert (use.fusion, use.runs, use.shape, use.dtype) == (fusion, "eager", (3, 6, 16), torch.float32)
    assert use.device == torch.device("cpu")
    assert reason in use.reason
    assert str(use) == f"{fusion} [3, 6, 16] float32 on cpu: eager ({use.reason})"


@pytest.mark.parametrize("fusion", FUSIONS)
def test_triton_on_the_cpu_is_an_error_that_says_why(fusion):
    alignment = make(fusion, "triton")
    with pytest.raises(KernelError, match=r"on the CPU.*kernel=\"eager\"") as caught:
        alignment(*tokens())
    assert isinstance(caught.value, EmmaError)
    assert isinstance(caught.value, RuntimeError)
    assert alignment.kernel_report() == ()


def test_a_patched_model_that_cannot_run_its_kernel_can_again_when_told_otherwise(tmp_path):
    model, inputs = tiny.llava(), tiny.token_inputs([1])
    adapter = patch_model(model, EmmaConfig(kernel="triton"))
    with torch.no_grad():
        with pytest.raises(KernelError, match="on the CPU"):
            model(**inputs)
        with adapter.disabled():
            original = model(**inputs).logits
    adapter.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["config"]["kernel"] == "auto"
    assert load_adapter(model, tmp_path).config.kernel == "triton"
    adapter = load_adapter(model, tmp_path, kernel="eager")
    assert adapter.config.kernel == adapter.alignment.config.kernel == "eager"
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, original)
    assert [use.runs for use in adapter.kernel_report()] == ["eager"]

    elsewhere = load_adapter(tiny.llava(), tmp_path)
    assert elsewhere.config.kernel == "auto"
    assert load_adapter(tiny.llava(), tmp_path, kernel="triton").config.kernel == "triton"


def test_load_adapter_refuses_an_unknown_kernel_and_leaves_the_model_alone(tmp_path):
    patch_model(tiny.llava()).save_pretrained(tmp_path)
    model = tiny.llava()
    with pytest.raises(ConfigError, match=r"EmmaConfig.kernel .*'cuda'"):
        load_adapter(model, tmp_path, kernel="cuda")
    patch_model(model)


def test_a_fusion_without_a_kernel(monkeypatch):
    monkeypatch.setattr(registry, "FUSIONS", dict(registry.FUSIONS))

    @register_fusion("plain")
    class Plain(Fusion):
        def forward(self, visual_tokens, instruction_tokens, instruction_mask, grid=None):
            return visual_tokens

    with pytest.raises(ConfigError, match="'plain' has no Triton kernel"):
        make("plain", "triton")
    alignment = make("plain")
    assert alignment(*tokens())[0].shape == (6, 16)
    assert alignment.kernel_report() == ()
    # Images of several sizes need nothing from it.
    packing = Packing([(1, 2), (2, 2)], torch.tensor([1, 0]))
    v = torch.randn(6, 16)
    assert torch.equal(alignment(v, torch.randn(2, 4, 6), packing=packing), v)


def test_the_report_does_not_grow_without_end():
    alignment = make("attention")
    for number in range(3 * dispatch._MAX_REMEMBERED):
        alignment.fusion.dispatch._note("eager", f"reason {number}", torch.zeros(1, 6, 16))
    report = alignment.kernel_report()
    assert len(report) == dispatch._MAX_REMEMBERED
    assert report[-1].reason == f"reason {3 * dispatch._MAX_REMEMBERED - 1}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_compiled_graph_has_no_breaks_and_is_reported(fusion):
    alignment = make(fusion)
    v, t = tokens()
    mask = torch.tensor([[True] * 4, [False] * 4])
    compiled = torch.compile(alignment, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(v, t, mask), v)
    (use,) = alignment.kernel_report()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for number in range(3):
            # What else is reported concerns no compiled graph.
            alignment.fusion.dispatch._note("eager", f"reason {number}", v)
            compiled(v, t, mask)
    assert (use.runs, use.shape) == ("eager", None)
    assert "compiled" in str(use)


def test_copies_report_for_themselves():
    alignment = make("attention")
    alignment(*tokens())
    for copied in (copy.deepcopy(alignment), pickle.loads(pickle.dumps(alignment))):
        copied(*tokens(5))
        assert copied.kernel_report()[0].shape == (5, 6, 16)
    assert alignment.kernel_report()[0].shape == (2, 6, 16)


def test_auto_asks_the_measurements_first(monkeypatch):
    """On a GPU that is never there: what is asked, in which order."""
    known = measured.measured_case("attention", torch.float32, backward=True)
    monkeypatch.setattr(dispatch, "_no_triton", lambda device: None)
    monkeypatch.setattr(dispatch, "_INTERPRETED", True)
    monkeypatch.setattr(measured, "least_tokens", lambda device, case: 12 if case == known else None)
    v, _ = tokens()

    def asked(kernel: str, problem: str | None, trains: bool = True) -> tuple[bool, str]:
        own = dispatch.Dispatch("attention", kernel)
        return own.takes_triton(v, lambda: problem, trains=trains), own.report()[0].reason

    assert asked("auto", None) == (True, "measured to be as fast on this device")
    assert asked("auto", "too wide") == (False, "too wide")
    assert asked("triton", None) == (True, 'kernel="triton"')
    assert asked("eager", None) == (False, 'kernel="eager"')
    runs, reason = asked("auto", None, trains=False)
    assert not runs
    assert reason.startswith("attention/float32/forward was not measured")
    v = v[:, :5]
    runs, reason = asked("auto", None)
    assert not runs
    assert "as fast from 12 visual tokens on" in reason


def test_auto_does_not_replace_rounded_products(monkeypatch):
    """Under autocast PyTorch multiplies in bfloat16, which exact float32 kernels were not compared with."""
    monkeypatch.setattr(dispatch, "_no_triton", lambda device: None)
    monkeypatch.setattr(dispatch, "_INTERPRETED", True)
    monkeypatch.setattr(measured, "least_tokens", lambda device, case: 0)
    v, _ = tokens()
    own = dispatch.Dispatch("attention", "auto")
    assert own.takes_triton(v, lambda: None, trains=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert not own.takes_triton(v, lambda: None, trains=True)
        assert own.takes_triton(v.bfloat16(), lambda: None, trains=True)
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        assert not own.takes_triton(v, lambda: None, trains=True)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


def test_a_triton_that_cannot_be_imported_is_a_reason(monkeypatch):
    monkeypatch.setattr(dispatch, "_INTERPRETED", True)
    monkeypatch.setitem(sys.modules, "emma_adapter.kernels.launch", None)
    alignment = make("attention")
    alignment(*tokens())
    assert alignment.kernel_report()[0].runs == "eager"
    with pytest.raises(KernelError, match="can't be imported"):
        make("attention", "triton")(*tokens())


def test_measurements_are_by_device_and_float16_follows_bfloat16(monkeypatch):
    from_64, nowhere = {"min_tokens": 64}, None
    cases = {
        "linear/bfloat16/forward": from_64,
        "linear/bfloat16/forward+backward": nowhere,
        "attention/bfloat16/forward": from_64,
        "attention/float16/forward": nowhere,
    }
    monkeypatch.setattr(measured, "_measured", lambda: {"GPU 9000": cases})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {9000 + device.index}")

    def least(case: str, device: str = "cuda:0") -> int | None:
        return measured.least_tokens(torch.device(device), case)

    assert least("linear/bfloat16/forward") == least("linear/float16/forward") == 64
    assert least("linear/float32/forward") is None
    assert least("linear/bfloat16/forward+backward") is least("linear/float16/forward+backward") is None
    assert least("attention/float16/forward") is None
    assert least("linear/bfloat16/forward", "cuda:1") is None
    assert least("linear/bfloat16/forward", "cpu") is None


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_graph_asks_the_measurements_for_its_size(monkeypatch):
    monkeypatch.setattr(measured, "least_tokens", torch.compiler.assume_constant_result(lambda device, case: 18))
    monkeypatch.setattr(dispatch, "_INTERPRETED", True)
    monkeypatch.setattr(dispatch, "_no_triton", lambda device: "asked for a kernel")
    alignment = make("attention")
    compiled = torch.compile(alignment, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch, reason in ((2, "from 18 visual tokens on"), (3, "asked for a kernel")):
        compiled(*tokens(batch))
        assert reason in alignment.kernel_report()[-1].reason


def test_the_shipped_measurements_name_known_cases():
    cases = {
        measured.measured_case(fusion, dtype, backward=backward)
        for fusion in FUSIONS
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
        for backward in (False, True)
    }
    shipped = json.loads(measured.MEASURED_FILE.read_text())
    for found in shipped.values():
        assert set(found) <= cases
        assert all(least is None or least["min_tokens"] > 0 for least in found.values())


def test_a_gpu_or_a_compiler_that_is_too_old_is_named(monkeypatch):
    pytest.importorskip("triton")
    from emma_adapter.kernels import launch
    from emma_adapter.kernels.launch import device_problem

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Turing")
    monkeypatch.setattr(torch.version, "hip", None)
    assert "Turing" in device_problem(torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert device_problem(torch.device("cuda", 0)) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    monkeypatch.setattr(launch, "TRITON_VERSION", (3, 8))
    assert device_problem(torch.device("cuda", 0)) is None
    monkeypatch.setattr(launch, "TRITON_VERSION", (3, 7))
    assert "its compiler crashes there; Triton 3.8 can" in device_problem(torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert device_problem(torch.device("cuda", 0)) is None
    assert "meta" in device_problem(torch.device("meta"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"visual": torch.zeros(2, 6, 16)}, r"\[M, 16\] with packing"),
        ({"visual": torch.zeros(7, 16)}, "announces 6 visual tokens and there are 7"),
        ({"rows": torch.tensor([0])}, "the instruction of 2 images"),
        ({"rows": torch.tensor([0, 2])}, r"from 0 to 1; got \[0, 2\]"),
        ({"rows": torch.tensor([0, -1])}, r"from 0 to 1; got \[0, -1\]"),
    ],
)
def test_packing_must_fit(change, message):
    packing = Packing([(1, 2), (2, 2)], change.get("rows", torch.tensor([1, 0])))
    with pytest.raises(EmmaError, match=message):
        make("attention")(change.get("visual", torch.zeros(6, 16)), torch.zeros(2, 4, 6), packing=packing)
