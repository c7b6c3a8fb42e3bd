"""Phi-4-multimodal: what the contract asks of every family, of a model that projects one image at a time."""

from __future__ import annotations

import pytest
import torch

from emma_adapter import RoutingError, UnsupportedModelError, load_adapter, unpatch_model
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
from tests.support.zoo import Row, answered
from tests.support.zoo.phi4_multimodal import CROP, ENTRY

ROWS = [
    Row(("how many dogs are there?",), images=((56, 56),), seed=1),
    Row(("yes, no, two, three.",), seed=3),
    Row(("what is left?", "is there a cat?"), images=((84, 28), (40, 100)), seed=2, system="A chat."),
]
WITH_IMAGES = [0, 2]
fusions = pytest.mark.parametrize("fusion", FUSIONS)


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
    assert effect[1] == 0
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


def test_an_instruction_moves_the_images_of_its_own_row_only():
    model, _ = trained(ENTRY)
    batch = ENTRY.batch(ROWS)
    asked = ["is there a cat?", "how many dogs?", "yes?"]
    before = last_logits(model, batch, instruction=asked)
    for number in range(len(ROWS)):
        other = [*asked[:number], "describe the left bird in detail", *asked[number + 1 :]]
        moved = (last_logits(model, batch, instruction=other) - before).abs().amax(dim=1)
        assert (moved > EFFECT).tolist() == [row == number and row in WITH_IMAGES for row in range(len(ROWS))]


def test_generation_goes_on_without_images():
    model, adapter = trained(ENTRY)
    batch = ENTRY.batch(ROWS)
    length = batch["input_ids"].shape[1]
    calls = aligned(model, adapter, lambda: model.generate(**batch, max_new_tokens=3, do_sample=False))
    assert len(calls) == 3  # an image each
    together = model.generate(**batch, max_new_tokens=3, num_beams=2)[:, length:]
    assert together.shape == (3, 3)


def test_images_that_do_not_fit_the_prompt_are_an_error():
    model, _ = trained(ENTRY)
    one, two = ENTRY.batch(ROWS[:1]), ENTRY.batch(ROWS[2:])
    with pytest.raises(RoutingError, match="placeholder"):
        model(**{**two, **{name: one[name] for name in ("input_ids", "attention_mask")}})


def test_the_grids_are_those_of_the_picture_without_its_padding():
    """One patch of the picture changes the token that its place says, and nothing else before the tower."""
    model, _ = patched(ENTRY)
    embed = model.model.embed_tokens_extend.image_embed
    side = CROP // 4  # tokens of a crop
    wide = ENTRY.batch([Row(images=((2 * CROP, CROP // 2),))])
    # In place of the tower, each patch is the mean of its pixels.
    width = model.config.vision_config.hidden_size
    embed.get_img_features = lambda pixels, attention_mask: (
        torch.nn.functional.avg_pool2d(pixels.mean(1), 4).flatten(1)[..., None].expand(-1, -1, width).contiguous()
    )
    seen = []
    handle = embed.img_projection_up.register_forward_pre_hook(lambda module, args: seen.append(args[0]), prepend=True)
    changed = {**wide, "image_pixel_values": wide["image_pixel_values"].clone()}
    changed["image_pixel_values"][0, 2, :, 8:12, 20:24] += 1  # the right crop, token (2, 5)
    for batch in (wide, changed):
        last_logits(model, batch)
    handle.remove()
    moved = ((seen[1] - seen[0]).abs().amax(-1)[0] > 0).nonzero().flatten().tolist()
    columns = 2 * side + 1
    assert moved == [2 * columns + side + 5]
    assert seen[0].shape[1] == (side // 2) * columns + 1 + side * (side + 1)


def test_answers_never_reach_the_visual_tokens_and_gradients_reach_the_adapter():
    model, adapter = patched(ENTRY)
    adapter.train_only()
    train(adapter)
    model.train()
    one, other = (answered(ENTRY, ROWS, answer) for answer in ("a red bird.", "two dogs, and a tree on the left?"))
    first = aligned(model, adapter, lambda: model(**one))

    def step() -> None:
        model(**other).loss.backward()

    second = aligned(model, adapter, step)
    assert len(first) == len(second) == 3
    for before, after in zip(first, second, strict=True):
        assert torch.equal(before, after)
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in adapter.parameters())


def test_what_the_first_layer_puts_out_is_not_aligned():
    with pytest.raises(UnsupportedModelError, match="first of two layers"):
        patched(ENTRY, place="after_projector")
