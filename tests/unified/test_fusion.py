"""Latents of reference pictures meet the visual tokens of the same places, in every family that is supported."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from emma_adapter import EmmaError, UnifiedConfig, unify_model
from emma_adapter.models import registry
from emma_adapter.unified.fusion import fusing
from emma_adapter.unified.prompts import encode_prompts
from tests.support.zoo import ZOO
from tests.unified.small import autoencoder, drawn, picture, seeded

DOCS = Path(__file__).parents[2] / "docs"
#: Families that can't draw, and what the error says.
REFUSED = {
    "gemma3n": "embedding of each token id",
    "gemma4": "embedding of each token id",
    "glm5_next": "linear attention",
    "molmo2": "can't be put together",
    "ovis2": "no tokens of the language model yet",
    "kimi_k25": "fused, shared, or none",
    "lfm2_vl": "no tokens of the language model yet",
    "minicpmv4_6": "linear attention",
    "minicpmv4_7": "linear attention",
    "paligemma": "chat template",
    "qwen3_5": "linear attention",
    "qwen3_5_moe": "linear attention",
    "qwen4_exp": "no decoder with .layers",
}


class Colours(nn.Module):
    """An autoencoder by the protocol alone: a latent is the mean colour of its cell."""

    def __init__(self, compression: int = 32) -> None:
        super().__init__()
        self.config = SimpleNamespace(latent_channels=3, scaling_factor=None)
        self.spatial_compression_ratio = compression

    def encode(self, x):
        return SimpleNamespace(latent=F.avg_pool2d(x, self.spatial_compression_ratio))

    def decode(self, z):
        return SimpleNamespace(sample=F.interpolate(z, scale_factor=self.spatial_compression_ratio))


def fused_colours(name: str, images: list[Image.Image], compression: int = 32) -> torch.Tensor:
    """``[T, 3]``, what the fusion added to each token of the projector: the colour at its place."""
    entry = ZOO[name]
    model = entry.model()
    settings = {"processor": entry.processor(), "autoencoder": Colours(compression)}
    adapter = unify_model(model, UnifiedConfig(decoupling=2, latent_std=(0.5,) * 3, latent_mean=(0.0,) * 3), **settings)
    with torch.no_grad():
        model.emma_unified.default.fusion["latents"][:3] = torch.eye(3) / 2
    family = adapter._state.family
    inner = family.inner(model)
    seen = []
    handle = family.projector(inner).register_forward_hook(
        lambda module, args, output: seen.append(output), prepend=True
    )
    after = family.projector(inner).register_forward_hook(lambda module, args, output: seen.append(output))
    inputs = encode_prompts(entry.processor(), ["what?"], [images])
    with torch.no_grad(), fusing(True):
        inner(**inputs)
    handle.remove()
    after.remove()
    [before, fused] = seen
    assert torch.equal((fused - before).flatten(0, -2)[:, 3:], torch.zeros_like(before.flatten(0, -2)[:, 3:]))
    return (fused - before).flatten(0, -2)[:, :3]


#: Families that cut pictures into tiles; the whole picture comes last.
TILED = ("internvl", "idefics3", "smolvlm", "cohere2_vision", "aya_vision")
# Every family whose pictures keep their size: (side of a token in pixels, heights and widths).
KEPT = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "mistral3"), 28),
    **dict.fromkeys(("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"), 28),
    **dict.fromkeys(("glm4v", "glm46v", "glm4v_moe", "glm_ocr"), 28),
    "llava_pixtral": 14,
}


@pytest.mark.parametrize("name", KEPT)
def test_each_token_gets_the_latent_of_its_place(name):
    """Of two pictures that aren't square, in the order of the projector's output, exactly."""
    side = KEPT[name]
    images = [picture(1, 84, 56), picture(2, 56, 112)]
    wanted = []
    for image in images:
        pixels = torch.from_numpy(np.array(image.convert("RGB"), dtype=np.float32) / 255).permute(2, 0, 1)
        enlarged = F.interpolate(
            pixels[None], (image.height // side * 32, image.width // side * 32), mode="bicubic", antialias=True
        ).clamp(0, 1)
        wanted.append(F.avg_pool2d(enlarged * 2 - 1, 32)[0].flatten(1).mT)
    wanted = torch.cat(wanted)
    order = torch.arange(len(wanted))
    if name.startswith("qwen2_5"):
        # Its projector puts out windows of 4 x 4 patches, 2 x 2 tokens, one after another.
        order = torch.cat([window_order(2, 3), 6 + window_order(4, 2)])
    torch.testing.assert_close(fused_colours(name, images), wanted[order], atol=2e-3, rtol=0)


def window_order(rows: int, columns: int) -> torch.Tensor:
    places = [(y // 2, x // 2, y, x) for y in range(rows) for x in range(columns)]
    return torch.tensor([y * columns + x for _, _, y, x in sorted(places)])


@pytest.mark.parametrize("name", sorted(set(ZOO) - set(KEPT) - set(REFUSED)))
@pytest.mark.parametrize("compression", [32, 8])
def test_quadrants_are_where_they_belong(name, compression):
    """Of families that resize or cut pictures: in the entry that shows the whole picture, each corner has its
    colour."""
    colours = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])
    pixels = (colours.view(2, 2, 3).repeat_interleave(42, 0).repeat_interleave(42, 1) * 255).numpy().astype(np.uint8)
    got = fused_colours(name, [Image.fromarray(pixels)], compression)
    entries = got.unflatten(0, (-1, int(len(got) / entries_of(name))))
    whole = entries[-1 if name in TILED else 0]
    side = int(len(whole) ** 0.5)
    corners = whole.view(side, side, 3)[[0, 0, -1, -1], [0, -1, 0, -1]] / 2 + 0.5
    # A grid of odd length has cells on the borders; a single token has all of the picture.
    if side == 1:
        torch.testing.assert_close(corners[0], colours.mean(0), atol=0.06, rtol=0)
    else:
        torch.testing.assert_close(corners, colours, atol=0.2, rtol=0)


def entries_of(name: str) -> int:
    image = Image.new("RGB", (84, 84), (9, 9, 9))
    inputs = encode_prompts(ZOO[name].processor(), ["what?"], [[image]])
    shape = inputs["pixel_values"].shape
    return shape[1] if len(shape) == 5 else shape[0]


@pytest.mark.parametrize("name", sorted(set(ZOO) - set(REFUSED)))
def test_every_supported_family_draws_and_edits(name):
    entry = ZOO[name]
    adapter = unify_model(entry.model(), processor=entry.processor(), autoencoder=autoencoder())
    adapter.set_progress_bar_config(disable=True)
    made = drawn(adapter, ["a dog", "make it blue"], [None, [picture(1), picture(2, 84, 56)]], generator=seeded(0))
    assert made.shape == (2, 8, 2, 3) and bool(made.isfinite().all())


def documented() -> dict[str, bool]:
    text = (DOCS / "unified.md").read_text()
    rows = text.split("<!-- models")[1].split("\n\n")[0].splitlines()[3:]
    found = {}
    for row in rows:
        names, draws = (cell.strip() for cell in row.strip("|").split("|")[:2])
        found |= {name.strip(" `"): draws.startswith("yes") for name in names.split(",")}
    return found


def test_the_table_of_models_is_that_of_the_registry():
    table = documented()
    assert set(table) == set(registry.family_names())
    drawing = {ZOO[name].model().config.model_type for name in ZOO if name not in REFUSED}
    assert {name for name, draws in table.items() if draws} == drawing


@pytest.mark.parametrize("name", sorted(set(REFUSED) & set(ZOO)))
def test_the_others_are_refused_with_the_reason(name):
    entry = ZOO[name]
    model = entry.model()
    with pytest.raises(EmmaError, match=REFUSED[name]):
        unify_model(model, processor=entry.processor(), autoencoder=autoencoder())
    assert not any("emma" in key for key in model.state_dict())
