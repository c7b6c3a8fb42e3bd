"""Prompts by a processor's chat template, against what transformers itself makes of the same conversations."""

from __future__ import annotations

import pytest
import torch

from emma_adapter.models.prompts import Prompts
from tests.support import tiny
from tests.support.zoo import ZOO

QUESTIONS = ["What colour is the bird on the tree?", "Is there a cat?"]


def conversation(question, image):
    """``image``: a picture in the conversation itself, or none where pictures are passed beside it."""
    shown = {"type": "image"} if image is None else {"type": "image", "image": image}
    return [{"role": "user", "content": [shown, {"type": "text", "text": question}]}]


WITH_TEMPLATE = [entry for entry in ZOO.values() if entry.processor().chat_template is not None]


@pytest.mark.parametrize("entry", WITH_TEMPLATE, ids=lambda entry: entry.name)
def test_a_batch_is_what_transformers_makes_of_each_conversation(entry):
    """Not one token more or less at the beginning, whether or not the template writes the token that begins a text."""
    processor = entry.processor()
    pictures = [tiny.picture(number).resize((56, 56)) for number in range(2)]
    batch = Prompts(processor).batch(
        [conversation(question, None) for question in QUESTIONS], [[picture] for picture in pictures]
    )
    for row, (question, picture) in enumerate(zip(QUESTIONS, pictures, strict=True)):
        alone = processor.apply_chat_template(
            conversation(question, picture),
            add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        )  # fmt: skip
        mask = batch["attention_mask"][row].bool()
        assert batch["input_ids"][row][mask].tolist() == alone["input_ids"][0].tolist()
        if batch["pixel_values"].ndim == alone["pixel_values"].ndim == 4:
            # One tensor a picture, or as many patches for each.
            # MiniCPM-V's lie side by side in a single one.
            axis = 0 if len(batch["pixel_values"]) > 1 else -1
            assert torch.equal(batch["pixel_values"].chunk(len(QUESTIONS), axis)[row], alone["pixel_values"])
