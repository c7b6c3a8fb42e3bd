"""Bases whose weights accelerate has offloaded draw, edit and learn what whole ones do, and keep nothing loaded."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from torch import nn

from emma_adapter import UnifiedConfig, load_unified
from tests.support.budget import budget
from tests.support.zoo import ZOO, Row
from tests.unified.small import autoencoder, drawn, picture, seeded, unified

CPU = torch.device("cpu")


def one_layer_on_disk(model: nn.Module, folder: str) -> nn.Module:
    """As ``from_pretrained(device_map="auto", offload_folder=…)`` does, where memory ends within the decoder."""
    inner = {f"model.{name}": "cpu" for name, _ in model.model.named_children() if name != "language_model"}
    text = {f"model.language_model.{name}": "cpu" for name, _ in model.model.language_model.named_children()}
    text.pop("model.language_model.layers")
    text |= {f"model.language_model.layers.{n}": "disk" if n else "cpu" for n in range(2)}
    device_map = {**inner, **text, "lm_head": "cpu"}
    return dispatch_model(model, device_map, main_device="cpu", force_hooks=True, offload_dir=folder)


PLACEMENTS = {
    "one layer on disk": one_layer_on_disk,
    "cpu_offload": lambda model, folder: cpu_offload(model, execution_device=CPU),
    "disk_offload": lambda model, folder: disk_offload(model, folder, execution_device=CPU),
    "with buffers": lambda model, folder: cpu_offload(model, execution_device=CPU, offload_buffers=True),
}
CONFIGS = {"low rank": UnifiedConfig(decoupling=2), "full": UnifiedConfig(decoupling="full")}


PAIRS = [(placement, decoupling) for placement in PLACEMENTS for decoupling in CONFIGS]
FEW = [("one layer on disk", "low rank"), ("with buffers", "full")]


@pytest.mark.parametrize(("placement", "decoupling"), budget(FEW, PAIRS))
@pytest.mark.parametrize("name", budget(["qwen3_vl"], ["qwen3_vl", "qwen2_5_vl", "gemma3", "llava"]))
def test_an_offloaded_base_draws_and_learns_what_a_whole_one_does(tmp_path, name, placement, decoupling):
    whole = unified(name, CONFIGS[decoupling])
    whole.save_pretrained(tmp_path / "branch")
    model = PLACEMENTS[placement](ZOO[name].model(), str(tmp_path / "weights"))
    away = {key for key, value in model.named_parameters() if value.is_meta}
    assert any(".layers.1." in key for key in away)
    plain = ZOO[name].batch([Row("what is it?", ((56, 84),))])
    with torch.no_grad():
        before = model(**plain).logits
    processor = ZOO[name].processor()
    adapter = load_unified(model, tmp_path / "branch", processor=processor, autoencoder=autoencoder())
    adapter.set_progress_bar_config(disable=True)
    made = []
    for one in (whole, adapter):
        one.train_only()
        settings = {"generator": seeded(0), "output_type": "pt", "image_guidance_scale": 1.5}
        pixels = drawn(one, ["make it blue", "a dog"], [picture(1), None], **settings)
        loss = one.loss("x", torch.full((1, 3, 64, 64), 0.3), picture(2), generator=seeded(1))
        loss.backward()
        made.append([pixels, loss.detach(), *(p.grad for p in one.parameters() if p.grad is not None)])
    assert all(map(torch.equal, *made)) and len(made[0]) == len(made[1]) > 10
    assert {key for key, value in model.named_parameters() if value.is_meta} == away
    with torch.no_grad():
        assert torch.equal(model(**plain).logits, before)
    adapter.remove()
