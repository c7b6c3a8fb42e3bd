"""On the digits model the analysis shows what a reader can check by eye: which cell the question is about."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

from benchmarks.digits_vqa import arms, runs
from benchmarks.digits_vqa.scenes import POSITIONS, render
from benchmarks.digits_vqa.vlm import BASE_DIR
from emma_adapter import get_adapter
from emma_adapter.analysis import diagnose, token_movement

SCENES = 16


@pytest.mark.slow
def test_the_adapter_amplifies_the_cell_that_is_asked_for():
    processor = AutoProcessor.from_pretrained(BASE_DIR)
    data = runs.make_data(processor, train_scenes=2000, test_scenes=SCENES, pairs=8, split="test")
    asks = [i for i, question in enumerate(data.train.questions) if question.type == "digit at position"]
    train = replace(
        data.train,
        questions=[data.train.questions[i] for i in asks],
        conversations=[data.train.conversations[i] for i in asks],
    )
    torch.manual_seed(0)
    arm = arms.emma("modulation")(arms.load_base(), processor)
    runs.train(arm, train, processor, steps=150, batch_size=64, seed=0)
    for number, position in enumerate(POSITIONS):
        talk = [
            {
                "role": "user",
                "content": [{"type": "image"}, {"type": "text", "text": f"what digit is at the {position} ?"}],
            }
        ]
        prompt = processor.apply_chat_template(talk, add_generation_prompt=True)
        encoded = processor.tokenizer([prompt] * SCENES, return_tensors="pt", return_token_type_ids=False)
        maps = token_movement(get_adapter(arm.model), {**encoded, "pixel_values": data.test.pixel_values[:SCENES]})
        gains = np.stack([one.gain for one in maps])
        assert gains.shape == (SCENES, 4, 4)
        # The four cells of a scene, in reading order, are four visual tokens each.
        cells = gains.reshape(SCENES, 2, 2, 2, 2).mean((2, 4)).reshape(SCENES, 4)
        assert cells.mean(0).argmax() == number
        assert (cells.argmax(1) == number).mean() > 0.9, position


@pytest.fixture(scope="module")
def base():
    """The untrained adapter on the demo's base model."""
    processor = AutoProcessor.from_pretrained(BASE_DIR)
    return get_adapter(arms.emma("modulation")(arms.load_base(), processor).model)


def asked_of(base, kinds, scenes):
    """What ``diagnose`` takes, of questions of some types: in the demo the first two gain, and counting colours is
    solved without an adapter."""
    processor = AutoProcessor.from_pretrained(BASE_DIR)
    pictures, questions = runs.ask_for_test(scenes, "test")
    chosen = [question for question in questions if question.type in kinds]
    data = runs._question_set(processor, render(pictures), chosen)
    batches = [
        runs.make_batch(processor.tokenizer, data, range(start, min(start + 100, len(chosen))), answered=False)
        for start in range(0, len(chosen), 100)
    ]
    return base, batches, [question.answer for question in chosen], [question.type for question in chosen]


@pytest.mark.slow
def test_the_diagnosis_tells_beforehand_which_types_of_questions_gain(base):
    """By their types alone, each of which is asked of four positions."""
    found = diagnose(*asked_of(base, ("digit at position", "colour at position"), 250))
    assert [asked.verdict for asked in found.attributes] == ["can help"] * 2
    assert all(asked.instructions == 4 and asked.apart for asked in found.attributes)


@pytest.mark.slow
def test_of_few_questions_of_a_type_nothing_is_claimed(base):
    """As many as a report reads if it isn't told otherwise."""
    found = diagnose(*asked_of(base, ("digit at position", "relation"), 40))
    assert {asked.verdict for asked in found.attributes} == {"can't be told"}
