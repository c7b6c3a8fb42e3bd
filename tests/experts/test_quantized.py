"""A base of 4 or 8 bits gets experts where its vision tower was left whole."""

from __future__ import annotations

import pytest
import torch
from transformers import BitsAndBytesConfig, LlavaForConditionalGeneration, Trainer, TrainingArguments

from emma_adapter import UnsupportedModelError, add_vision_expert, load_vision_experts
from tests.support import tiny

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
def test_an_expert_beside_a_quantized_language_model(folder, kind, tmp_path):
    def load(*whole):
        config = BitsAndBytesConfig(**KINDS[kind], llm_int8_skip_modules=["lm_head", *whole])
        return LlavaForConditionalGeneration.from_pretrained(folder, quantization_config=config, device_map="cpu")

    with pytest.raises(UnsupportedModelError, match=r"llm_int8_skip_modules"):
        add_vision_expert(load(), "stem")
    model = load("model.vision_tower")
    experts = add_vision_expert(model, "stem").train_only("stem")
    before = [p.detach().clone() for p in model.emma_experts.of("stem")]
    row = {**tiny.chat_inputs([[tiny.user("is there a cat?")]])}
    row["labels"] = row["input_ids"]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, save_steps=1, learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True
    )
    Trainer(model, arguments, data_collator=lambda rows: rows[0], train_dataset=[row]).train()
    assert not any(map(torch.equal, before, model.emma_experts.of("stem")))
    again = load_vision_experts(load("model.vision_tower"), tmp_path / "checkpoint-1")
    assert all(map(torch.equal, again.parameters(), experts.parameters()))
