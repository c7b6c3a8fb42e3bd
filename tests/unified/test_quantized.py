"""A base of 4 or 8 bits draws with low-rank copies."""

from __future__ import annotations

import pytest
import torch
from transformers import BitsAndBytesConfig, LlavaForConditionalGeneration, Trainer

import tiny
from emma_adapter import UnifiedConfig, UnsupportedModelError, load_unified, unify_model, unpatch_model

from .small import autoencoder, drawn, picture, seeded
from .test_training import arguments

pytestmark = pytest.mark.filterwarnings("ignore")
KINDS = {
    "8 bit": {"load_in_8bit": True},
    "4 bit": {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base whose weights bitsandbytes can pack in blocks of 64."""
    text, vision = tiny.llama_config(len(tiny.tokenizer())), tiny.vision_config()
    for config in (text, vision):
        config.hidden_size = config.intermediate_size = 128
    text.head_dim = 32
    folder = tmp_path_factory.mktemp("wide")
    tiny.llava(text_config=text, vision_config=vision, image_token=4).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_base_learns_to_draw(folder, kind, tmp_path):
    settings = {"processor": tiny.processor(), "autoencoder": autoencoder()}

    def load():
        config = BitsAndBytesConfig(**KINDS[kind])
        return LlavaForConditionalGeneration.from_pretrained(folder, quantization_config=config, device_map="cpu")

    model = load()
    inputs = tiny.chat_inputs([[tiny.user("is there a cat?")]])
    with torch.no_grad():
        # Of another one: bitsandbytes packs weights for the CPU in a call without gradients, and none pass them then.
        before = load()(**inputs).logits
    with pytest.raises(UnsupportedModelError, match="quantized"):
        unify_model(model, UnifiedConfig(decoupling="full"), **settings)
    unified = unify_model(model, UnifiedConfig(decoupling=4), **settings).train_only()
    unified.set_progress_bar_config(disable=True)
    tiny.train_randomly(model.emma_unified, 0.05)
    row = {"prompt": "a dog", "target": picture(1, 64, 64)}
    rows = [row, {**row, "image": picture(3)}]
    values = [parameter.detach().clone() for parameter in unified.parameters()]
    steps = arguments(tmp_path, max_steps=1, save_steps=1)
    Trainer(model, steps, data_collator=unified.collator(dropout=False), train_dataset=rows).train()
    moved = dict(zip((name for name, _ in unified.named_parameters()), values, strict=True))
    assert not [name for name, value in unified.named_parameters() if torch.equal(moved[name], value)]
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)
    want = drawn(unified, "x", picture(3), generator=seeded(0))
    again = load_unified(load(), tmp_path / "checkpoint-1", **settings).set_progress_bar_config(disable=True)
    torch.testing.assert_close(drawn(again, "x", picture(3), generator=seeded(0)), want, atol=1e-5, rtol=1e-5)
    unpatch_model(model)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)
