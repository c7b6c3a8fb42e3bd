"""A step of drawing under ``torch.compile``."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from emma_adapter import UnifiedConfig
from tests.support.budget import budget
from tests.unified.small import drawn, picture, seeded, unified


@pytest.fixture(autouse=True)
def _anew():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", budget(["qwen3_vl"], ["qwen3_vl", "qwen2_5_vl", "llava", "internvl", "gemma3"]))
@pytest.mark.parametrize("decoupling", budget([3], [3, "full"]))
def test_a_step_is_one_graph_which_serves_all_drawings(name, decoupling):
    adapter = unified(name, UnifiedConfig(decoupling=decoupling))
    requests = [
        {"prompt": "a bird"},
        {"prompt": "a bird"},
        {"prompt": "a red bird in a tree", "guidance_scale": 1.0},
        {"prompt": ["a cat", "two dogs and another one"], "height": 96},
        {"prompt": "make it blue", "image": picture(1), "image_guidance_scale": 2.0, "width": 128},
        {"prompt": "one more cat", "height": 128},
    ][: budget(2, 6)]
    wanted = [drawn(adapter, generator=seeded(1), **request) for request in requests]
    counted = CompileCounter()
    adapter.compile(backend=counted, fullgraph=True)
    found = []
    for request in requests:
        found.append(drawn(adapter, generator=seeded(1), **request))
    assert all(map(torch.equal, wanted, found))
    # The first; other numbers of tokens; other numbers of rows.
    assert counted.frame_count <= 4, counted.frame_count
    before = counted.frame_count
    for request in requests:
        drawn(adapter, generator=seeded(1), **request)
    assert counted.frame_count == before


def test_what_is_learned_is_drawn():
    """Weights are inputs of what was compiled, not a part of it."""
    adapter = unified("qwen3_vl", UnifiedConfig(decoupling=3)).compile(backend="aot_eager")
    before = drawn(adapter, generator=seeded(1))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.mul_(1.5)
    after = drawn(adapter, generator=seeded(1))
    assert not torch.equal(before, after)
    other = copy.deepcopy(adapter).compile(disable=True)
    assert torch.equal(after, drawn(other, generator=seeded(1)))


@pytest.mark.nightly
def test_inductor_draws_the_same():
    adapter = unified("qwen3_vl", UnifiedConfig(decoupling=3))
    wanted = drawn(adapter, generator=seeded(1))
    torch.testing.assert_close(drawn(adapter.compile(), generator=seeded(1)), wanted, atol=1e-4, rtol=1e-4)
