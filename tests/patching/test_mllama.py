"""Llama 3.2 Vision: what the contract asks of every family, with as many pictures in each row as the plain model needs.

In a batch whose rows have other numbers of pictures, the plain model shows words before a row's pictures the padding.
"""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor

from emma_adapter import (
    EmmaConfig,
    RoutingError,
    UnsupportedModelError,
    add_vision_expert,
    load_adapter,
    patch_model,
    unify_model,
    unpatch_model,
)
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
from tests.support.zoo.mllama import ENTRY
from tests.unified.small import autoencoder

ONE = [
    Row(("how many dogs are there?",), images=((56, 56),), seed=1),
    Row(("what is left?", "is there a cat?"), images=((28, 84),), seed=2, system="A chat."),
    Row(("is there a tree?",), images=((20, 20),), seed=3),
]
TWO = [
    Row(("what differs?",), images=((56, 28), (112, 28)), seed=4),
    Row(("is there a cat?",), images=((30, 60), (28, 28)), seed=5),
]
MIXED = [TWO[0], ONE[0]]
fusions = pytest.mark.parametrize("fusion", FUSIONS)


def without_picture(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """The batch with a row that shows nothing, as newer processors make it."""
    ids, aspects = batch["input_ids"].clone(), batch["aspect_ratio_ids"].clone()
    pixels, tiles, seen = (
        batch[name].clone() for name in ("pixel_values", "aspect_ratio_mask", "cross_attention_mask")
    )
    placeholder = ENTRY.model().config.image_token_id
    ids[row][ids[row] == placeholder] = 10
    aspects[row], pixels[row], seen[row] = 0, 0, 0
    tiles[row] = torch.tensor([1, 0, 0, 0])
    return {
        **batch,
        "input_ids": ids,
        "aspect_ratio_ids": aspects,
        "pixel_values": pixels,
        "aspect_ratio_mask": tiles,
        "cross_attention_mask": seen,
    }


@fusions
@pytest.mark.parametrize("place", ["before_projector", "after_projector"])
def test_identity_on_off_and_unpatched(fusion, place):
    model, batch = ENTRY.model(), ENTRY.batch(MIXED)
    assert set(batch) <= set(inspect.signature(model.forward).parameters)
    before, left = last_logits(model, batch), snapshot(model)
    model, adapter = patched(ENTRY, fusion, place=place)
    assert torch.equal(last_logits(model, batch), before)
    train(adapter)
    changed = last_logits(model, batch)
    assert (changed - before).abs().amax(dim=1).min() > EFFECT
    with adapter.disabled():
        assert torch.equal(last_logits(model, batch), before)
    unpatch_model(model)
    assert torch.equal(last_logits(model, batch), before)
    assert set(snapshot(model)) == set(left)


@fusions
def test_rows_generate_and_saving(fusion, tmp_path):
    model, adapter = patched(ENTRY, fusion)
    train(adapter)
    for rows in (ONE, TWO):
        assert_rows_stand_alone(ENTRY, model, rows)
        batch = ENTRY.batch(rows)
        torch.testing.assert_close(generated(model, batch), last_logits(model, batch), atol=SAME, rtol=0)
    adapter.save_pretrained(tmp_path)
    other = ENTRY.model()
    load_adapter(other, tmp_path, processor=ENTRY.processor())
    assert torch.equal(last_logits(other, batch), last_logits(model, batch))


@pytest.mark.parametrize("mode", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}, {"use_cache": False}])
def test_generation_keeps_rows_apart(mode):
    model, _ = trained(ENTRY)
    settings = {"max_new_tokens": 3, "do_sample": False, **mode}
    batch = ENTRY.batch(TWO)
    together = model.generate(**batch, **settings)[:, batch["input_ids"].shape[1] :]
    copies = mode.get("num_return_sequences", 1)
    for number, row in enumerate(TWO):
        one = ENTRY.batch([row])
        alone = model.generate(**one, **settings)[:, one["input_ids"].shape[1] :]
        assert torch.equal(together[number * copies : (number + 1) * copies], alone)


@pytest.mark.parametrize("rows", [ONE, TWO, MIXED, MIXED[::-1]], ids=["one", "two", "mixed", "mixed-backwards"])
def test_an_instruction_moves_the_images_of_its_own_row_only(rows):
    model, _ = trained(ENTRY)
    batch = ENTRY.batch(rows)
    asked = ["is there a cat?", "how many dogs?", "yes?"][: len(rows)]
    before = last_logits(model, batch, instruction=asked)
    for number in range(len(rows)):
        other = [*asked[:number], "describe the left bird in detail", *asked[number + 1 :]]
        moved = (last_logits(model, batch, instruction=other) - before).abs().amax(dim=1)
        assert (moved > EFFECT).tolist() == [row == number for row in range(len(rows))]


def test_the_padding_of_a_row_without_images_meets_its_own_words():
    model, adapter = trained(ENTRY)
    batch = without_picture(ENTRY.batch(ONE), 1)
    asked = ["is there a cat?", "how many dogs?", "yes?"]
    before = last_logits(model, batch, instruction=asked)
    for number in (0, 2):
        other = [*asked[:number], "describe the left bird in detail", *asked[number + 1 :]]
        moved = (last_logits(model, batch, instruction=other) - before).abs().amax(dim=1)
        assert (moved > EFFECT).tolist() == [row == number for row in range(3)]
        assert moved[1] == 0
    text = {name: batch[name][1:2] for name in ("input_ids", "attention_mask")}
    with adapter.disabled():
        plain = last_logits(model, text)
    assert torch.equal(last_logits(model, text), plain)


def test_every_image_of_a_row_and_no_other_meets_its_instruction():
    model, _ = trained(ENTRY)
    batch = ENTRY.batch(MIXED)
    asked = ["is there a cat?", "how many dogs?"]
    seen = []
    handle = model.model.multi_modal_projector.register_forward_hook(lambda module, args, output: seen.append(output))
    last_logits(model, batch, instruction=asked)
    last_logits(model, batch, instruction=["describe the left bird in detail", asked[1]])
    handle.remove()
    moved = (seen[1] - seen[0]).abs().amax(dim=(2, 3, 4)) > 0
    assert moved.tolist() == [[True, True], [False, False]]


def test_images_of_another_row_are_an_error():
    model, _ = trained(ENTRY)
    batch = ENTRY.batch(MIXED)
    swapped = {name: batch[name].flip(0) for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
    with pytest.raises(RoutingError, match="placeholder"):
        last_logits(model, {**batch, **swapped})


def test_a_tile_is_its_class_token_and_then_its_patches_row_by_row():
    model = ENTRY.model()
    tower = model.model.vision_model
    side = tower.image_size // tower.patch_size
    pixels = torch.zeros(1, 3, tower.image_size, tower.image_size)
    pixels[0, :, : tower.patch_size, tower.patch_size :] = 1
    patches = tower.patch_embedding(pixels).flatten(2).transpose(1, 2)
    assert (patches.abs().amax(-1) > 0).tolist() == [[False, True, *[False] * (side * side - 2)]]
    assert torch.equal(tower.apply_class_embedding(patches)[:, 0], tower.class_embedding[None])


def test_answers_never_reach_the_visual_tokens():
    model, adapter = patched(ENTRY)
    train(adapter)
    model.train()
    one, other = (answered(ENTRY, ONE, answer) for answer in ("a red bird.", "two dogs, and a tree on the left?"))
    [first], [second] = (aligned(model, adapter, lambda batch=batch: model(**batch)) for batch in (one, other))
    assert torch.equal(first, second)


@fusions
def test_gradients_reach_every_parameter_of_the_adapter(fusion):
    model, adapter = patched(ENTRY, fusion)
    adapter.train_only()
    model.train()
    train(adapter)
    model(**answered(ENTRY, TWO, "a red bird.")).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in adapter.parameters())
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if ".emma." not in name)


def test_experts_and_drawing_are_refused_with_the_reason():
    model = ENTRY.model()
    with pytest.raises(UnsupportedModelError, match="2 stacks of blocks with an MLP"):
        add_vision_expert(model, "charts")
    with pytest.raises(UnsupportedModelError, match="cross-attention"):
        unify_model(model, processor=ENTRY.processor(), autoencoder=autoencoder())
    assert not any("emma" in key for key in model.state_dict())
    assert patch_model(model, EmmaConfig(fusion="attention"), processor=ENTRY.processor()) is not None
