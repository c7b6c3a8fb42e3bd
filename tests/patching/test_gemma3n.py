"""Gemma 3n: a projector that also embeds the ids of special tokens, and audio beside pictures."""

from __future__ import annotations

import torch

from emma_adapter import EmmaConfig, patch_model
from emma_adapter.analysis.observing import observe
from tests.patching.test_families import EFFECT, batch_of, last_logits, patched, train
from tests.support.zoo import ZOO, Row

ENTRY = ZOO["gemma3n"]
SEEN = Row(("how many dogs are there?",), images=((56, 56),))


def test_token_ids_that_the_projector_embeds_pass_by():
    model, adapter = patched(ENTRY)
    train(adapter)
    embedded = []
    handle = model.model.embed_vision.register_forward_hook(
        lambda module, args, kwargs, output: embedded.append((kwargs.get("input_ids"), output)), with_kwargs=True
    )
    batch = batch_of(ENTRY, (SEEN,))
    last_logits(model, batch)
    with adapter.disabled():
        last_logits(model, batch)
    handle.remove()
    (ids, of_ids), (no_ids, of_image), (_, plain_of_ids), (_, plain_of_image) = embedded
    assert ids is not None and no_ids is None
    assert torch.equal(of_ids, plain_of_ids)
    assert (of_image - plain_of_image).abs().max() > EFFECT


def test_the_analysis_takes_the_images_output_and_not_that_of_ids():
    model, adapter = patched(ENTRY)
    train(adapter)
    [entry] = observe(model, batch_of(ENTRY, (SEEN,)), projected=True)
    with torch.no_grad(), adapter.instruction("how many dogs are there?"):
        features = model.model.get_image_features(batch_of(ENTRY, (SEEN,))["pixel_values"]).pooler_output
    torch.testing.assert_close(entry.projected, features[0])
    assert (entry.projected - entry.projected_before).abs().max() > EFFECT


def test_audio_passes_by():
    """The audio's features are what they are without an adapter, and only the picture's row changes."""
    model, processor = ENTRY.model(), ENTRY.processor()
    talk = [{"role": "user", "content": [{"type": "text", "text": "what is said? <audio_soft_token>"}]}]
    batch = dict(
        processor(
            text=[processor.apply_chat_template(one, add_generation_prompt=True) for one in (talk, SEEN.messages())],
            audio=list(torch.randn(1, 16000).numpy()),
            images=[[], SEEN.pictures()],
            add_special_tokens=False,
            padding=True,
            return_tensors="pt",
        )
    )
    before = last_logits(model, batch)
    silent = last_logits(model, {**batch, "input_features": torch.zeros_like(batch["input_features"])})
    assert (silent - before)[0].abs().max() > EFFECT
    adapter = patch_model(model, EmmaConfig(fusion="attention", inner_dim=16), processor=processor)
    assert torch.equal(last_logits(model, batch), before)
    train(adapter)
    changed = last_logits(model, batch)
    assert torch.equal(changed[0], before[0])
    assert (changed - before)[1].abs().max() > EFFECT
