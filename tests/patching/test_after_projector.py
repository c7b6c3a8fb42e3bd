"""``EmmaConfig(place="after_projector")``: the same contract where the adapter aligns what the projector makes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from emma_adapter import (
    CheckpointError,
    EmmaConfig,
    Fusion,
    RoutingError,
    UnsupportedModelError,
    load_adapter,
    patch_model,
    register_fusion,
    unpatch_model,
)
from emma_adapter.analysis.observing import observe
from emma_adapter.models.families import MediaLayout
from emma_adapter.models.projected_tokens import joined, projected_layout
from emma_adapter.models.registry import find_family
from tests.patching.test_families import (
    EFFECT,
    ROWS,
    SAME,
    WITH_IMAGES,
    batch_of,
    feature_arguments,
    last_logits,
    train,
)
from tests.support.budget import some
from tests.support.zoo import ZOO, Entry, Row

CONFIGS = {
    "modulation": EmmaConfig(place="after_projector", inner_dim=16),
    "moda": EmmaConfig.moda(inner_dim=16, num_heads=4),
    "attention": EmmaConfig(fusion="attention", place="after_projector", inner_dim=16),
}
#: Families behind whose projector nothing can be aligned, and what the error says.
REFUSED = dict.fromkeys(("ovis2", "lfm2_vl"), "no tokens of the language model yet")
ENTRIES = [entry for entry in ZOO.values() if entry.name not in REFUSED]
entries = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
each_config = pytest.mark.parametrize(
    ("entry", "config"), some(2, ENTRIES, list(CONFIGS)), ids=lambda value: getattr(value, "name", value)
)


def patched(entry: Entry, config: EmmaConfig):
    model = entry.model()
    adapter = patch_model(model, config, processor=entry.processor())
    return model, adapter


@each_config
def test_the_contract(entry, config, tmp_path):
    plain, batch = entry.model(), batch_of(entry, ROWS)
    before = last_logits(plain, batch)
    model, adapter = patched(entry, CONFIGS[config])
    assert torch.equal(last_logits(model, batch), before)
    train(adapter)
    changed = last_logits(model, batch)
    effect = (changed - before).abs().amax(dim=1)
    assert effect[WITH_IMAGES].min() > EFFECT
    assert effect[2] == 0
    for number, row in enumerate(ROWS):
        torch.testing.assert_close(changed[[number]], last_logits(model, batch_of(entry, (row,))), atol=SAME, rtol=0)
    settings = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    torch.testing.assert_close(model.generate(**batch, **settings).logits[0], changed, atol=SAME, rtol=0)
    adapter.save_pretrained(tmp_path)
    other = entry.model()
    load_adapter(other, tmp_path, processor=entry.processor())
    assert torch.equal(last_logits(other, batch), changed)
    with adapter.disabled():
        assert torch.equal(last_logits(model, batch), before)
    unpatch_model(model)
    assert torch.equal(last_logits(model, batch), before)


@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if entry.videos], ids=lambda entry: entry.name)
def test_videos(entry):
    frames = (3, 3) if entry.stacks_videos else (2, 3)
    rows = (Row(("is there a cat?",), videos=frames[:1], seed=1), Row(("how many dogs?",), videos=frames[1:], seed=5))
    model, adapter = patched(entry, CONFIGS["modulation"])
    batch = batch_of(entry, rows)
    before = last_logits(model, batch)
    train(adapter)
    changed = last_logits(model, batch)
    assert (changed - before).abs().amax(dim=1).min() > EFFECT
    for number, row in enumerate(rows):
        torch.testing.assert_close(changed[[number]], last_logits(model, batch_of(entry, (row,))), atol=SAME, rtol=0)


# ------------------------------------------------------------------------------------------------- where a token lies

#: Families that put tiles or videos together after the projector, or return two grids of an image as one: no raster.
_NO_RASTER = ("llava_next", "llava_next_video", "llava_onevision", "molmo2")


@pytest.fixture
def places(registry):
    """A fusion that adds to each visual token its place in raster order."""

    @register_fusion("place")
    class PlaceFusion(Fusion):
        def __init__(self, config: EmmaConfig) -> None:
            super().__init__(config)
            self.scale = nn.Parameter(torch.zeros(()))

        def forward(self, visual_tokens, instruction_tokens, instruction_mask, grid=None) -> Tensor:
            order = torch.arange(visual_tokens.shape[1], dtype=visual_tokens.dtype)
            return visual_tokens + self.scale * order[None, :, None]


@pytest.mark.parametrize("entry", [e for e in ENTRIES if not e.name.startswith(_NO_RASTER)], ids=lambda e: e.name)
def test_tokens_come_in_raster_order_to_the_fusion(entry, places):
    """What a model's own method returns lies row by row, whatever order its projector works in."""
    rows = (Row(("what?",), images=((112, 84),), seed=1), Row(("what?",), images=((56, 112),), seed=2))
    batch = batch_of(entry, rows)
    model, adapter = patched(entry, EmmaConfig(fusion="place", place="after_projector"))
    arguments = feature_arguments(model, batch)

    def features() -> list[Tensor]:
        with torch.no_grad(), adapter.instruction(["what?"]):
            found = model.model.get_image_features(**arguments)
        found = getattr(found, "pooler_output", found)
        return list(found) if isinstance(found, (list, tuple)) else list(found.unbind(0))

    before = features()
    adapter.alignment.fusion.scale.data.fill_(1.0)
    after = features()
    assert len(before) == len(after) >= len(rows)
    for one, other in zip(before, after, strict=True):
        seen = (other - one).flatten(0, -2)
        # Of an image, or of its tiles one after another.
        tile = int(seen[:, 0].max().round()) + 1
        place = (torch.arange(len(seen)) % tile).to(seen.dtype)
        assert tile >= 4
        torch.testing.assert_close(seen, place[:, None].expand_as(seen), atol=1e-4, rtol=0)


@entries
def test_the_analysis_sees_what_the_projector_made(entry):
    model, adapter = patched(entry, CONFIGS["modulation"])
    train(adapter)
    inner = find_family(model).inner(model)
    outputs: list[Tensor] = []

    def look(module, args, kwargs, output):
        # Gemma 3n's embeds token ids, too.
        if next(value for value in (*args, *kwargs.values()) if value is not None).is_floating_point():
            outputs.append(joined(output).detach())

    handle = find_family(model).projector(inner).register_forward_hook(look, with_kwargs=True)
    seen = observe(model, batch_of(entry, ROWS[:1]))
    handle.remove()
    width = model.get_input_embeddings().weight.shape[1]
    assert all(one.before.shape[1] == one.after.shape[1] == width for one in seen)
    # By value: a model may call its projector with tiles or windows in another order than an image's.
    together = torch.cat([one.after for one in seen])
    expected = torch.cat([output.flatten(0, -2) for output in outputs])
    assert together.shape == expected.shape
    torch.testing.assert_close(together.sum(0), expected.sum(0), atol=1e-3, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("name", REFUSED)
def test_a_projector_that_puts_out_something_else_is_refused(name):
    model = ZOO[name].model()
    with pytest.raises(UnsupportedModelError, match=REFUSED[name]):
        patch_model(model, CONFIGS["modulation"], processor=ZOO[name].processor())
    assert not any("emma" in key for key in model.state_dict())


def test_an_output_that_cannot_be_divided_is_an_error(monkeypatch):
    entry = ZOO["llava"]
    model, _ = patched(entry, CONFIGS["modulation"])
    projector = model.model.multi_modal_projector
    forward = type(projector).forward
    # As a projector that mixes its images.
    monkeypatch.setattr(type(projector), "forward", lambda self, x: forward(self, x).flatten(0, 1)[None])
    with pytest.raises(RoutingError, match="projector_merge"):
        last_logits(model, batch_of(entry, ROWS[:2]))


def test_a_layout_is_merged_by_squares():
    order = torch.tensor([0, 1, 4, 5, 2, 3, 6, 7])  # blocks of 2 x 2 of a grid 2 x 4
    layout = MediaLayout(tokens=[2], entries=[1], grids=[(2, 4)], packed=True, orders={(2, 4): order})
    merged = projected_layout(layout, 2, torch.zeros(2, 3))
    assert merged.grids == [(1, 2)]
    assert merged.orders is not None and merged.orders[1, 2].tolist() == [0, 1]
    windows = replace(layout, orders={(2, 4): torch.tensor([2, 3, 6, 7, 0, 1, 4, 5])})
    merged = projected_layout(windows, 2, torch.zeros(2, 3))
    assert merged.orders is not None and merged.orders[1, 2].tolist() == [1, 0]


def test_an_output_may_be_the_grid_of_each_entry():
    layout = MediaLayout(tokens=[2], entries=[1], grids=[(2, 4)])
    assert projected_layout(layout, 2, torch.zeros(1, 1, 2, 3)).grids == [(1, 2)]
    with pytest.raises(RoutingError, match="projector_merge"):
        projected_layout(layout, 2, torch.zeros(1, 2, 1, 3))


def test_an_adapter_does_not_load_where_embeddings_have_another_width(tmp_path):
    entry = ZOO["llava"]
    _, adapter = patched(entry, CONFIGS["modulation"])
    adapter.save_pretrained(tmp_path)
    other = entry.model()
    other.resize_token_embeddings(len(entry.processor().tokenizer) + 8)
    load_adapter(other, tmp_path, processor=entry.processor())  # more words of the same width
    config = entry.model().config
    config.text_config.hidden_size = 64
    with pytest.raises(CheckpointError, match="another language model"):
        load_adapter(type(other)(config), tmp_path, processor=entry.processor())
