"""Nemotron 3 Nano Omni: what the contract asks of every family, of a model without an inner one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from PIL import Image
from torch import Tensor

from emma_adapter import (
    EmmaConfig,
    RoutingError,
    UnsupportedModelError,
    load_adapter,
    patch_model,
    unify_model,
    unpatch_model,
)
from tests.experts.small import features, learn_router, pixels_of, same, stock_with, with_expert
from tests.patching.test_families import (
    EFFECT,
    FUSIONS,
    SAME,
    aligned,
    assert_rows_stand_alone,
    generated,
    last_logits,
    patched,
    train,
    trained,
)
from tests.patching.test_llava import snapshot
from tests.support.tiny import PATCH
from tests.support.zoo import Row, answered
from tests.support.zoo.nemotron_h_omni import ENTRY
from tests.unified.small import autoencoder

pytestmark = pytest.mark.skipif(
    not hasattr(hf, "NemotronH_Omni_Reasoning_V3_Config"), reason="came with transformers 5.24"
)
ROWS = [
    Row(("how many dogs are there?",), images=((56, 56),), seed=1),
    Row(("what is left?", "is there a cat?"), images=((28, 84), (112, 56)), seed=2, system="A chat."),
    Row(("yes, no, two, three.",), seed=3),
    Row(images=((84, 28), (60, 90), (30, 30)), seed=4),
]
WITH_IMAGES = [0, 1, 3]
VIDEOS = Row(("what is left?",), videos=(4, 4), seed=5)
AUDIO = np.random.default_rng(0).standard_normal(8000).astype("float32")
fusions = pytest.mark.parametrize("fusion", FUSIONS)
places = pytest.mark.parametrize("place", ["before_projector", "after_projector"])


def with_audio(*pictures: Image.Image) -> dict[str, Any]:
    """One prompt with a sound."""
    processor = ENTRY.processor()
    content = [{"type": "image"} for _ in pictures] + [{"type": "text", "text": "how many? <so_embedding>"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return dict(processor(text=[text], images=list(pictures) or None, audio=[AUDIO], return_tensors="pt"))


def two_prompts_with_videos() -> dict[str, Any]:
    """As ``generate`` makes them of one, but each with a video of its own; the processor takes one prompt."""
    rows = [ENTRY.batch([Row(("what is left?",), videos=(4,), seed=seed)]) for seed in (6, 7)]
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


@fusions
def test_identity_rows_generate_saving_and_unpatched(fusion, tmp_path):
    model, batch = ENTRY.model(), ENTRY.batch(ROWS)
    before, left = last_logits(model, batch), snapshot(model)
    model, adapter = patched(ENTRY, fusion)
    assert torch.equal(last_logits(model, batch), before)
    train(adapter)
    changed = last_logits(model, batch)
    effect = (changed - before).abs().amax(dim=1)
    assert effect[WITH_IMAGES].min() > EFFECT
    assert effect[2] == 0
    assert_rows_stand_alone(ENTRY, model, ROWS)
    torch.testing.assert_close(generated(model, batch), changed, atol=SAME, rtol=0)
    adapter.save_pretrained(tmp_path)
    other = ENTRY.model()
    load_adapter(other, tmp_path, processor=ENTRY.processor())
    assert torch.equal(last_logits(other, batch), changed)
    with adapter.disabled():
        assert torch.equal(last_logits(model, batch), before)
    unpatch_model(model)
    assert torch.equal(last_logits(model, batch), before)
    assert set(snapshot(model)) == set(left)


@places
@pytest.mark.parametrize("rows", [ROWS[:2], [VIDEOS]], ids=["images", "videos"])
def test_identity_in_both_places(place, rows):
    model, batch = ENTRY.model(), ENTRY.batch(rows)
    before = last_logits(model, batch)
    model, adapter = patched(ENTRY, place=place)
    assert torch.equal(last_logits(model, batch), before)
    train(adapter)
    changed = last_logits(model, batch)
    assert (changed - before).abs().amax(dim=1).min() > EFFECT
    torch.testing.assert_close(generated(model, batch), changed, atol=SAME, rtol=0)
    unpatch_model(model)
    assert torch.equal(last_logits(model, batch), before)


@pytest.mark.parametrize("kind", ["images", "videos"])
def test_an_instruction_moves_what_its_own_row_shows_only(kind):
    model, _ = trained(ENTRY)
    batch = ENTRY.batch(ROWS) if kind == "images" else two_prompts_with_videos()
    shown = WITH_IMAGES if kind == "images" else [0, 1]
    asked = ["is there a cat?", "how many dogs?", "yes?", "what colour?"][: len(batch["input_ids"])]
    before = last_logits(model, batch, instruction=asked)
    for number in range(len(asked)):
        other = [*asked[:number], "describe the left bird in detail", *asked[number + 1 :]]
        moved = (last_logits(model, batch, instruction=other) - before).abs().amax(dim=1)
        assert (moved > EFFECT).tolist() == [row == number and row in shown for row in range(len(asked))]


@pytest.mark.parametrize("mode", [{"num_beams": 2}, {"num_beams": 2, "num_return_sequences": 2}, {"use_cache": False}])
@pytest.mark.parametrize("rows", [ROWS, [VIDEOS]], ids=["images", "videos"])
def test_generation_keeps_rows_apart(mode, rows):
    model, _ = trained(ENTRY)
    settings = {"max_new_tokens": 3, "do_sample": False, **mode}
    batch = ENTRY.batch(rows)
    together = model.generate(**batch, **settings)[:, batch["input_ids"].shape[1] :]
    copies = mode.get("num_return_sequences", 1)
    for number, row in enumerate(rows):
        one = ENTRY.batch([row])
        alone = model.generate(**one, **settings)[:, one["input_ids"].shape[1] :]
        assert torch.equal(together[copies * number : copies * (number + 1)], alone)


def test_features_by_themselves_follow_a_named_instruction():
    model, adapter = trained(ENTRY)
    batch = ENTRY.batch(ROWS[1:2])
    in_call = aligned(model, adapter, lambda: last_logits(model, batch, instruction=["how many dogs?"]))
    with adapter.instruction("how many dogs?"):
        by_itself = aligned(model, adapter, lambda: model.get_image_features(**pixels_of(batch)))
    assert torch.equal(in_call[0], by_itself[0])


def test_each_video_by_itself_follows_its_own_instruction():
    model, adapter = trained(ENTRY)
    pixels = pixels_of(ENTRY.batch([VIDEOS]))

    def of_videos(*instructions: str) -> list[Tensor]:
        with torch.no_grad(), adapter.instruction(list(instructions)):
            return list(model.get_video_features(**pixels).pooler_output)

    alike, different = of_videos("yes?", "yes?"), of_videos("yes?", "how many dogs?")
    torch.testing.assert_close(different[0], alike[0], atol=SAME, rtol=0)
    assert (different[1] - alike[1]).abs().max() > EFFECT


@pytest.mark.parametrize("pictures", [ROWS[0].pictures(), []], ids=["an image", "no image"])
def test_audio_passes_by(pictures):
    model, adapter = trained(ENTRY)
    batch = with_audio(*pictures)
    silent = {**batch, "input_features": torch.zeros_like(batch["input_features"])}
    assert not torch.equal(last_logits(model, batch), last_logits(model, silent))
    changed = last_logits(model, batch)
    with adapter.disabled():
        effect = (changed - last_logits(model, batch)).abs().max()
    assert effect > EFFECT if pictures else effect == 0
    torch.testing.assert_close(generated(model, batch), changed, atol=SAME, rtol=0)
    heard = aligned(model, adapter, lambda: last_logits(model, batch))
    unheard = aligned(model, adapter, lambda: last_logits(model, silent))
    assert len(heard) == len(unheard) == bool(pictures)
    assert all(torch.equal(one, other) for one, other in zip(heard, unheard, strict=True))


def test_videos_of_which_tokens_are_dropped():
    """The projector has put out all of them by then."""
    model, batch = ENTRY.model(), ENTRY.batch([VIDEOS])
    model.video_pruning_rate = 0.5
    with torch.no_grad():
        before = model(**batch).logits
    assert before.shape[1] < batch["input_ids"].shape[1]
    adapter = patch_model(model, EmmaConfig(fusion="attention", inner_dim=16), processor=ENTRY.processor())
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, before)
        train(adapter)
        changed = model(**batch).logits[:, -1]
    assert (changed - before[:, -1]).abs().max() > EFFECT
    torch.testing.assert_close(generated(model, batch), changed, atol=SAME, rtol=0)
    with adapter.disabled(), pytest.raises(ValueError, match="batch_size"):
        model(**batch, labels=batch["input_ids"])


def test_images_that_do_not_fit_the_prompt_are_an_error():
    model, _ = trained(ENTRY)
    one, two = ENTRY.batch(ROWS[:1]), ENTRY.batch(ROWS[1:2])
    with pytest.raises(RoutingError, match="placeholder"):
        model(**{**two, **{name: one[name] for name in ("input_ids", "attention_mask")}})
    with pytest.raises(RoutingError, match="placeholder"):
        model(**{**one, "pixel_values_videos": ENTRY.batch([VIDEOS])["pixel_values_videos"]})


def visual_tokens(model, adapter, batch, means) -> tuple[Tensor, list[tuple[int, int]]]:
    """What the adapter gets if, in place of the tower, each patch is the mean of its pixels; and the grids of it."""
    seen = []

    def tower(pixels, **_):
        mean = means(pixels)
        features = mean[..., None].expand(*mean.shape, model.config.vision_hidden_size).contiguous()
        return SimpleNamespace(features=features, last_hidden_state=features, hidden_states=None, attentions=None)

    handle = adapter.alignment.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args[0], kwargs["packing"].grids)), with_kwargs=True
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.vision_model, "forward", tower)
        last_logits(model, batch)
    handle.remove()
    return seen[0]


def test_visual_tokens_come_row_by_row():
    """One patch of the picture, or of a frame, changes the token that its place says."""
    model, adapter = patched(ENTRY)
    processor = ENTRY.processor()
    text = processor.apply_chat_template(Row(images=((1, 1), (1, 1))).messages(), add_generation_prompt=True)

    def image(place: tuple[int, int] | None) -> Tensor:
        second = np.zeros((4 * PATCH, 6 * PATCH, 3), dtype=np.uint8)
        if place is not None:
            y, x = (PATCH * number for number in place)
            second[y : y + PATCH, x : x + PATCH] = 255
        pictures = [Image.new("RGB", (2 * PATCH, 4 * PATCH)), Image.fromarray(second)]
        batch = dict(processor(text=[text], images=pictures, return_tensors="pt"))
        assert batch["image_grid_hw"].tolist() == [[4, 2], [4, 6]]
        tokens, grids = visual_tokens(model, adapter, batch, lambda pixels: pixels.mean(-1))
        assert grids == [(2, 1), (2, 3)]
        return tokens

    def video(place: tuple[int, int] | None) -> Tensor:
        batch = ENTRY.batch([VIDEOS])
        pixels = batch["pixel_values_videos"] = torch.zeros_like(batch["pixel_values_videos"])
        assert pixels.shape == (2, 2, 6, 4 * PATCH, 6 * PATCH)
        if place is not None:
            y, x = (PATCH * number for number in place)
            pixels[1, 0, :, y : y + PATCH, x : x + PATCH] = 1
        tokens, grids = visual_tokens(
            model, adapter, batch, lambda pixels: F.avg_pool2d(pixels.mean(1), PATCH).flatten(1)
        )
        assert grids == [(2, 3)] * 4
        return tokens

    for make, before in ((image, 2), (video, 2 * 6)):
        for y, x in ((0, 0), (1, 5), (2, 1), (3, 4)):
            moved = ((make((y, x)) - make(None)).abs().amax(-1) > 0).nonzero().flatten().tolist()
            assert moved == [before + (y // 2) * 3 + x // 2]


def test_answers_never_reach_the_visual_tokens_and_gradients_reach_the_adapter():
    model, adapter = patched(ENTRY)
    adapter.train_only()
    train(adapter)
    model.train()
    one, other = (answered(ENTRY, ROWS, answer) for answer in ("a red bird.", "two dogs, and a tree on the left?"))
    [first] = aligned(model, adapter, lambda: model(**one))

    def step() -> None:
        model(**other).loss.backward()

    [second] = aligned(model, adapter, step)
    assert torch.equal(first, second)
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in adapter.parameters())


@pytest.mark.parametrize("rows", [ROWS, [VIDEOS]], ids=["images", "videos"])
def test_vision_experts_take_whole_images_and_videos(rows):
    batch = ENTRY.batch(rows)
    want = last_logits(ENTRY.model(), batch)
    experts = with_expert(model=ENTRY.model(), trained=False)
    assert torch.equal(last_logits(experts.model, batch), want)
    experts = with_expert(model=ENTRY.model())
    original, other = features(ENTRY.model(), batch), features(stock_with(experts), batch)
    assert not any(same(original, other))
    labels = ["stem" if number % 2 else "original" for number in range(len(original))]
    learn_router(experts, labels, pixels_of(batch))
    with experts.watched() as report:
        mixed = features(experts.model, batch)
    assert [image.expert for image in report.images] == labels
    assert same(mixed, original) == [label == "original" for label in labels]
    assert same(mixed, other) == [label == "stem" for label in labels]


def test_drawing_is_refused_with_the_reason():
    model = ENTRY.model()
    with pytest.raises(UnsupportedModelError, match="linear attention"):
        unify_model(model, processor=ENTRY.processor(), autoencoder=autoencoder())
    assert not any("emma" in key for key in model.state_dict())
