"""What a GPU will try beside what is shipped: other tiles, and a prototype. They compute the same."""

from __future__ import annotations

import pytest
import torch

from benchmarks.kernels import one_program
from benchmarks.kernels.schedules import CANDIDATES, Candidate, using
from emma_adapter import EmmaAlignment, EmmaConfig
from tests.support import tiny


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("fusion", "candidate"), [(fusion, own) for fusion, own in CANDIDATES if own.blocks], ids=str)
def test_other_tiles_compute_the_same(fusion, candidate, dtype):
    """With larger and with smaller ones; neither the tokens nor the channels are a multiple of them."""
    alignment, visual, instruction, mask = trained(fusion, dtype)
    with torch.no_grad():
        shipped = alignment(visual, instruction, mask)
        with using(candidate):
            found = alignment(visual, instruction, mask)
        fewer = Candidate(candidate.kernel, 4, 1, tuple((name, size // 4) for name, size in candidate.blocks))
        with using(fewer):
            smaller = alignment(visual, instruction, mask)
    for other in (found, smaller):
        assert (other - shipped).abs().max() <= 4 * torch.finfo(dtype).eps * shipped.abs().max()


@pytest.mark.parametrize("fusion", ["attention", "modulation"])
def test_the_prototype_computes_the_same(fusion):
    alignment, visual, instruction, mask = trained(fusion, torch.float16)
    with torch.no_grad():
        shipped = alignment(visual, instruction, mask)
    prototype = one_program.OneProgram(alignment.fusion, visual, instruction, mask)
    found = prototype.run(one_program.SCHEDULES[0])
    assert (found - shipped).abs().max() <= 2e-3 * shipped.abs().max()
    assert torch.equal(found[1], visual[1])


def trained(fusion: str, dtype: torch.dtype):
    """An adapter with the kernels, and three images of 75 tokens; the second one's instruction is empty."""
    torch.manual_seed(0)
    config = EmmaConfig(
        fusion=fusion,
        kernel="triton",
        visual_dim=144,
        instruction_dim=24,
        visual_grid=(5, 15),
        max_instruction_tokens=9,
    )
    alignment = EmmaAlignment(config)
    tiny.train_randomly(alignment, scale=0.05)
    mask = torch.arange(9) < torch.tensor([[9], [0], [4]])
    return alignment, torch.randn(3, 75, 144).to(dtype), torch.randn(3, 9, 24).to(dtype), mask
