"""The fusions with ``kernel="triton"`` at the sizes of real models: ``pytest -m gpu``."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from emma_adapter import EmmaAlignment, EmmaConfig, Packing
from tests.kernels.precision import BITS, DTYPES, TOLERANCES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    # A compiler may warn of what is no concern of ours.
    pytest.mark.filterwarnings("ignore"),
]

FUSIONS = ["attention", "modulation", "linear"]
#: Grid and width of visual tokens.
MODELS = {
    "LLaVA-1.5": ((24, 24), 1024),
    "LLaVA-OneVision": ((27, 27), 1152),
    "InternVL": ((16, 16), 4096),
}
T, DT = 77, 768
SANITIZER_SECONDS = 300

every_fusion = pytest.mark.parametrize("fusion", FUSIONS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def make(fusion: str, model: str = "LLaVA-1.5", **changes) -> EmmaAlignment:
    grid, width = MODELS[model]
    sizes = {"visual_dim": width, "instruction_dim": DT, "visual_grid": grid, "max_instruction_tokens": T, **changes}
    torch.manual_seed(1)
    alignment = EmmaAlignment(EmmaConfig(fusion=fusion, kernel="triton", **sizes))
    with torch.no_grad():
        for parameter in alignment.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return alignment.cuda()


def tokens(model: str, dtype: torch.dtype, batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """The second instruction is empty, the third is short."""
    (height, width), channels = MODELS[model]
    v = torch.randn(batch, height * width, channels)
    valid = torch.tensor([[T], [0], [9]])[torch.arange(batch) % 3]
    mask = torch.arange(T) < valid
    return v.to("cuda", dtype), torch.randn(batch, T, DT).to("cuda", dtype), mask.cuda()


def results(alignment: EmmaAlignment, v: Tensor, t: Tensor, mask: Tensor | None, **kwargs) -> dict[str, Tensor]:
    v = v.clone().requires_grad_()
    alignment.zero_grad()
    y = alignment(v, t, mask, **kwargs)
    generator = torch.Generator().manual_seed(3)
    y.backward(torch.randn(y.shape, generator=generator).to(y.device, y.dtype))
    return {"y": y.detach(), "v": v.grad, **{name: p.grad.clone() for name, p in alignment.named_parameters()}}


def assert_correct(alignment: EmmaAlignment, v: Tensor, t: Tensor, mask: Tensor | None, **kwargs) -> None:
    """Within the table's tolerances, and within twice the error of PyTorch in the same dtype."""
    found = results(alignment, v, t, mask, **kwargs)
    eager = copy.deepcopy(alignment)
    eager.use_kernel("eager")
    same_dtype = results(eager, v, t, mask, **kwargs)
    exact = results(eager.double(), v.double(), t.double(), mask, **kwargs)
    assert {use.runs for use in alignment.kernel_report()} == {"triton"}
    for name, value in exact.items():
        scale = value.abs().max().clamp_min(1e-6)
        error = ((found[name].double() - value).abs().max() / scale).item()
        of_pytorch = ((same_dtype[name].double() - value).abs().max() / scale).item()
        forward, gradient = TOLERANCES[v.dtype]
        assert found[name].isfinite().all(), name
        assert error <= (forward if name == "y" else gradient), (name, error, of_pytorch)
        assert error <= 2 * of_pytorch + torch.finfo(v.dtype).eps, (name, error, of_pytorch)


@every_fusion
@every_dtype
@pytest.mark.parametrize("model", MODELS)
def test_dense(fusion, dtype, model):
    assert_correct(make(fusion, model), *tokens(model, dtype))


@every_dtype
@pytest.mark.parametrize("fusion", ["attention", "modulation"])
def test_packed(fusion, dtype):
    """Images of a dynamic resolution tower: large, tiny and repeated, of shared instructions."""
    alignment = make(fusion, visual_dim=1280)
    grids = [(96, 72), (2, 2), (34, 58), (24, 24), (96, 72)]
    packing = Packing(grids, torch.tensor([0, 2, 2, 1, 0]).cuda())
    v = torch.randn(sum(h * w for h, w in grids), 1280).to("cuda", dtype)
    _, t, mask = tokens("LLaVA-1.5", dtype)
    assert_correct(alignment, v, t, mask, packing=packing)


@every_fusion
@pytest.mark.parametrize("heads", [(2, 32), (8, 48), (8, 64), (5, 24)], ids=str)
def test_widths_of_heads(fusion, heads):
    number, width = heads
    assert_correct(make(fusion, inner_dim=number * width, num_heads=number), *tokens("LLaVA-1.5", torch.bfloat16))


@every_fusion
@every_dtype
def test_untrained_is_the_identity(fusion, dtype):
    (height, width), channels = MODELS["LLaVA-1.5"]
    config = EmmaConfig(
        fusion=fusion,
        kernel="triton",
        visual_dim=channels,
        instruction_dim=DT,
        visual_grid=(height, width),
        max_instruction_tokens=T,
    )
    v, t, mask = tokens("LLaVA-1.5", dtype)
    v[0, :5] = -0.0
    y = EmmaAlignment(config).cuda()(v, t, mask)
    assert torch.equal(y.view(BITS[dtype]), v.view(BITS[dtype]))


@every_fusion
@every_dtype
def test_the_same_bits_every_time(fusion, dtype):
    alignment, inputs = make(fusion), tokens("LLaVA-1.5", dtype, batch=8)
    first = results(alignment, *inputs)
    for _ in range(5):
        again = results(alignment, *inputs)
        assert all(torch.equal(first[name], again[name]) for name in first)


@every_fusion
def test_nothing_waits_for_the_gpu(fusion):
    alignment, (v, t, mask) = make(fusion), tokens("LLaVA-1.5", torch.bfloat16)
    results(alignment, v, t, mask)
    v.requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        alignment(v, t, mask).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def packed_tokens() -> tuple[Tensor, Tensor, Tensor, Packing]:
    grids = [(24, 24), (2, 2), (34, 58), (24, 24)]
    _, t, mask = tokens("LLaVA-1.5", torch.bfloat16)
    v = torch.randn(sum(h * w for h, w in grids), 1024).to("cuda", torch.bfloat16)
    return v, t, mask, Packing(grids, torch.tensor([0, 2, 2, 1]))


@pytest.mark.parametrize("fusion", ["attention", "modulation"])
def test_nothing_waits_for_the_gpu_when_packed(fusion):
    """Of other images than in the call before, but of grids that have been there; whose rows come from the host."""
    alignment, (v, t, mask, packing) = make(fusion), packed_tokens()
    results(alignment, v, t, mask, packing=packing)
    other = Packing([(34, 58), (24, 24), (24, 24), (2, 2)], torch.tensor([1, 0, 0, 2]))
    v.requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        alignment(v, t, mask, packing=other).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("fusion", ["attention", "modulation"])
def test_packed_in_a_cuda_graph(fusion):
    alignment, (v, t, mask, packing) = make(fusion), packed_tokens()

    class Packed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.alignment = alignment

        def forward(self, v: Tensor, t: Tensor, mask: Tensor) -> Tensor:
            return self.alignment(v, t, mask, packing=packing)

    plain = Packed()
    expected = results(plain, v, t, mask)
    graphed = torch.cuda.make_graphed_callables(plain, (v.clone().requires_grad_(), t, mask))
    for _ in range(3):
        found = results(graphed, v, t, mask)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@every_fusion
def test_launches_without_tritons_look_up_give_the_same_bits(fusion, monkeypatch):
    """On another stream too."""
    from emma_adapter.kernels import launch

    alignment, (v, t, mask) = make(fusion), tokens("LLaVA-1.5", torch.bfloat16)
    with monkeypatch.context() as looked_up:
        looked_up.setattr(launch, "DIRECT", False)
        expected = results(alignment, v, t, mask)
    torch.cuda.synchronize()
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            for _ in range(2):
                found = results(alignment, v, t, mask)
        stream.synchronize()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@every_fusion
def test_in_a_cuda_graph(fusion):
    alignment, (v, t, mask) = make(fusion), tokens("LLaVA-1.5", torch.bfloat16)
    expected = results(alignment, v, t, mask)
    graphed = torch.cuda.make_graphed_callables(alignment, (v.clone().requires_grad_(), t, mask))
    for _ in range(3):
        found = results(graphed, v, t, mask)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@every_fusion
def test_compiled_without_graph_breaks(fusion):
    alignment, (v, t, mask) = make(fusion), tokens("LLaVA-1.5", torch.bfloat16)
    expected = results(alignment, v, t, mask)
    compiled = torch.compile(alignment, fullgraph=True)
    v = v.clone().requires_grad_()
    y = compiled(v, t, mask)
    y.float().sum().backward()
    scale = expected["y"].abs().max()
    assert (y - expected["y"]).abs().max() <= 1e-2 * scale
    assert v.grad.isfinite().all()


@every_fusion
def test_under_autocast(fusion):
    alignment, (v, t, mask) = make(fusion), tokens("LLaVA-1.5", torch.float32)
    expected = alignment(v, t, mask)
    with torch.autocast("cuda", torch.bfloat16):
        found = alignment(v, t, mask)
        found.sum().backward()
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() <= 2e-2 * expected.abs().max()


@pytest.mark.parametrize("fusion", ["attention", "modulation"])
def test_sixteen_thousand_tokens_of_one_image(fusion):
    alignment = make(fusion, visual_grid=None)
    v = torch.randn(1, 16_384, 1024).to("cuda", torch.bfloat16)
    t, mask = torch.randn(1, 40, DT).to("cuda", torch.bfloat16), torch.ones(1, 40, dtype=torch.bool, device="cuda")
    assert_correct(alignment, v, t, mask)


@pytest.mark.parametrize("fusion", ["attention", "modulation"])
def test_offsets_beyond_32_bits(fusion):
    """More than 2^31 numbers in the visual tokens; the last image as if it were alone."""
    if torch.cuda.mem_get_info()[0] < 20e9:
        pytest.skip("needs 20 GB of GPU memory")
    alignment = make(fusion, "InternVL", visual_grid=None)
    v = torch.randn(1, 1024, 4096, device="cuda", dtype=torch.bfloat16).expand(600, -1, -1).contiguous()
    t = torch.randn(600, 8, DT, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        y = alignment(v, t)
        assert torch.equal(y[-1:], alignment(v[-1:], t[-1:]))


def test_compute_sanitizer_finds_nothing():
    """No racecheck: it reports hazards in Triton's reductions that are none (triton-lang/triton#7264)."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    workload = Path(__file__).with_name("gpu_workload.py")
    run = subprocess.run(
        [sanitizer, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, str(workload)],
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "WORKLOAD_DTYPES": "bfloat16"},
        capture_output=True,
        text=True,
        check=False,
        timeout=SANITIZER_SECONDS,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
