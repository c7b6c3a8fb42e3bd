"""Florence-2, an encoder-decoder: what the contract asks of every family, where prompts and answers have ids apart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

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
from tests.patching.test_families import EFFECT, FUSIONS, SAME, aligned, train
from tests.patching.test_llava import snapshot
from tests.support.zoo import Row
from tests.support.zoo.florence2 import ENTRY, GRID
from tests.support.zoo.text import CHATML, chat_template
from tests.unified.small import autoencoder

ROWS = [
    Row(("how many dogs are there?",), images=((56, 56),), seed=1),
    Row(("what is left?",), images=((28, 84),), seed=2),
    Row(("is there a cat in the tree?",), images=((112, 56),), seed=3),
]
fusions = pytest.mark.parametrize("fusion", FUSIONS)


def patched(fusion: str = "attention", **changes):
    model = ENTRY.model()
    config = EmmaConfig(fusion=fusion, inner_dim=16, instruction_policy="all_turns", **changes)
    return model, patch_model(model, config, processor=ENTRY.processor())


def trained(fusion: str = "attention", **changes):
    model, adapter = patched(fusion, **changes)
    train(adapter)
    return model, adapter


def batch_of(rows: list[Row]) -> dict[str, Tensor]:
    # Positions count padding on the left, with an adapter or without.
    return ENTRY.batch(rows, padding_side="right")


@torch.no_grad()
def first_logits(model: nn.Module, batch: dict[str, Tensor], **more) -> Tensor:
    """Of each row the logits of the answer's first token."""
    return model(**batch, **more).logits[:, 0]


def shown(row: Row, images: int) -> dict[str, Tensor]:
    """A row's question with its picture that many times; its processor knows one picture a row."""
    words = ENTRY.processor().tokenizer
    per_image = 1 + GRID[0] * GRID[1]
    text = f"{words.image_token * per_image * images}<s>{row.turns[-1]}</s>"
    ids = words(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    pixels = ENTRY.batch([row])["pixel_values"]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels.repeat(images, 1, 1, 1)}


def joined(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    length = max(batch["input_ids"].shape[1] for batch in batches)
    pad = ENTRY.processor().tokenizer.pad_token_id

    def padded(name: str, value: int) -> Tensor:
        rows = [batch[name] for batch in batches]
        return torch.cat([nn.functional.pad(row, (0, length - row.shape[1]), value=value) for row in rows])

    pixels = torch.cat([batch["pixel_values"] for batch in batches])
    return {
        "input_ids": padded("input_ids", pad),
        "attention_mask": padded("attention_mask", 0),
        "pixel_values": pixels,
    }


@fusions
@pytest.mark.parametrize("place", ["before_projector", "after_projector"])
def test_identity_on_off_and_unpatched(fusion, place):
    model = ENTRY.model()
    batch = batch_of(ROWS)
    before, left = first_logits(model, batch), snapshot(model)
    model, adapter = patched(fusion, place=place)
    assert torch.equal(first_logits(model, batch), before)
    train(adapter)
    changed = first_logits(model, batch)
    assert (changed - before).abs().amax(dim=1).min() > EFFECT
    with adapter.disabled():
        assert torch.equal(first_logits(model, batch), before)
    assert torch.equal(first_logits(model, batch), changed)
    unpatch_model(model)
    assert torch.equal(first_logits(model, batch), before)
    assert set(snapshot(model)) == set(left)


@fusions
def test_rows_generate_and_saving(fusion, tmp_path):
    model, adapter = trained(fusion)
    batch = batch_of(ROWS)
    together = first_logits(model, batch)
    for number, row in enumerate(ROWS):
        torch.testing.assert_close(together[[number]], first_logits(model, batch_of([row])), atol=SAME, rtol=0)
    settings = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    torch.testing.assert_close(model.generate(**batch, **settings).logits[0], together, atol=SAME, rtol=0)
    adapter.save_pretrained(tmp_path)
    other = ENTRY.model()
    load_adapter(other, tmp_path, processor=ENTRY.processor())
    assert torch.equal(first_logits(other, batch), together)


@pytest.mark.parametrize("mode", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}, {"use_cache": False}])
def test_generation_keeps_rows_apart(mode):
    model, _ = trained()
    settings = {"max_new_tokens": 3, "do_sample": False, **mode}
    together = model.generate(**batch_of(ROWS), **settings)
    copies = mode.get("num_return_sequences", 1)
    for number, row in enumerate(ROWS):
        alone = model.generate(**batch_of([row]), **settings)
        assert torch.equal(together[number * copies : (number + 1) * copies], alone)


def test_an_instruction_moves_the_image_of_its_own_row_only():
    model, _ = trained()
    batch = batch_of(ROWS)
    asked = ["is there a cat?", "how many dogs?", "yes?"]
    before = first_logits(model, batch, instruction=asked)
    for number in range(len(ROWS)):
        other = [*asked[:number], "describe the left bird in detail", *asked[number + 1 :]]
        moved = (first_logits(model, batch, instruction=other) - before).abs().amax(dim=1)
        assert (moved > EFFECT).tolist() == [row == number for row in range(len(ROWS))]


def test_rows_with_any_number_of_images():
    model, adapter = trained()
    parts = [shown(ROWS[0], 2), shown(ROWS[1], 0), shown(ROWS[2], 1)]
    together = first_logits(model, joined(parts))
    without = {name: value for name, value in parts[1].items() if name != "pixel_values"}
    for number, part in enumerate([parts[0], without, parts[2]]):
        torch.testing.assert_close(together[[number]], first_logits(model, part), atol=SAME, rtol=0)
    with adapter.disabled():
        effect = (first_logits(model, joined(parts)) - together).abs().amax(dim=1)
    assert effect[[0, 2]].min() > EFFECT
    assert effect[1] == 0
    with pytest.raises(RoutingError, match="placeholder"):
        first_logits(model, {**parts[0], "pixel_values": parts[2]["pixel_values"]})


def test_the_instruction_is_the_whole_prompt_whatever_the_labels():
    model, adapter = trained()
    batch = batch_of(ROWS[:1])
    of_prompt = aligned(model, adapter, lambda: first_logits(model, batch))
    of_words = aligned(model, adapter, lambda: first_logits(model, batch, instruction=list(ROWS[0].turns)))
    torch.testing.assert_close(of_words, of_prompt, atol=SAME, rtol=0)
    model.train()
    length = batch["input_ids"].shape[1]
    for labels in (batch["input_ids"][:, -4:], batch["input_ids"], torch.full((1, length), 7)):
        batch_with_labels = {**batch, "labels": labels}
        in_training = aligned(model, adapter, lambda given=batch_with_labels: model(**given))
        torch.testing.assert_close(in_training, of_prompt, atol=SAME, rtol=0)


@fusions
def test_gradients_reach_every_parameter_of_the_adapter(fusion):
    model, adapter = trained(fusion)
    adapter.train_only()
    model.train()
    model(**batch_of(ROWS), labels=torch.randint(5, 90, (3, 5))).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in adapter.parameters())
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if ".emma." not in name)


def test_the_mean_comes_first_and_then_the_places_row_by_row():
    model = ENTRY.model()
    seen = []
    projector = model.model.multi_modal_projector
    projector.image_projection.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    height, width = 3, 5
    features = torch.randn(1, model.config.vision_config.embed_dim[-1], height, width)
    other = features.clone()
    other[0, :, 1, 3] += 1
    with torch.no_grad():
        projector(features)
        projector(other)
    changed = (seen[1] - seen[0]).abs().amax(-1)[0] > 0
    assert changed.nonzero().flatten().tolist() == [0, 1 + 1 * width + 3]


def test_a_picture_that_is_not_square():
    model, adapter = trained("linear", num_visual_tokens=16, visual_grid=(4, 4))
    words = ENTRY.processor().tokenizer
    ids = words(f"{words.image_token * (1 + 3 * 5)}<s>how?</s>", add_special_tokens=False, return_tensors="pt")
    batch = {**ids, "pixel_values": torch.randn(1, 3, 96, 160)}
    batch = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    with adapter.disabled():
        before = first_logits(model, batch)
    assert (first_logits(model, batch) - before).abs().max() > EFFECT


def test_experts_and_drawing_are_refused_with_the_reason():
    model = ENTRY.model()
    with pytest.raises(UnsupportedModelError, match="0 stacks of blocks with an MLP"):
        add_vision_expert(model, "charts")
    processor = ENTRY.processor()
    processor.chat_template = chat_template(**CHATML, image="<image>")  # which drawing asks for first
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        unify_model(model, processor=processor, autoencoder=autoencoder())
    assert not any("emma" in key for key in model.state_dict())
