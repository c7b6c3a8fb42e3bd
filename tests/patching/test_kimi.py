"""Kimi K2.5: a video of several chunks of frames, each of which is like an image to the adapter."""

from __future__ import annotations

import pytest
import torch

from emma_adapter import InstructionError
from tests.patching.test_families import EFFECT, SAME, aligned, last_logits, trained
from tests.support.zoo import ZOO, Row
from tests.support.zoo.kimi import FRAMES_OF_A_CHUNK

ENTRY = ZOO["kimi_k25"]
ROWS = (
    Row(("is there a cat?",), videos=(FRAMES_OF_A_CHUNK + 2,), seed=1),
    Row(("how many dogs?",), images=((56, 28),), videos=(2, 2 * FRAMES_OF_A_CHUNK + 1), seed=2),
)


def test_chunks_meet_the_instruction_of_their_row():
    model, _ = trained(ENTRY)
    batch = ENTRY.batch(ROWS)
    assert batch["video_grid_thw"][:, 0].tolist() == [4, 2, 2, 4, 4, 1]
    together = last_logits(model, batch)
    for number, row in enumerate(ROWS):
        alone = last_logits(model, ENTRY.batch([row]))
        torch.testing.assert_close(together[[number]], alone, atol=SAME, rtol=0)
        told = last_logits(model, ENTRY.batch([row]), instruction="what colour is the left bird?")
        assert (told - alone).abs().max() > EFFECT


def test_a_video_encoded_alone_takes_an_instruction_for_each_chunk():
    model, adapter = trained(ENTRY)
    batch = ENTRY.batch(ROWS[:1])
    pixels = (batch["pixel_values_videos"], batch["video_grid_thw"])

    def encode() -> None:
        model.model.get_video_features(*pixels)

    with torch.no_grad():
        with adapter.instruction("is there a cat?"):
            [same] = aligned(model, adapter, encode)
        with adapter.instruction(["is there a cat?", "how many dogs?"]):
            [each] = aligned(model, adapter, encode)
        with adapter.instruction(["is there a cat?"] * 3), pytest.raises(InstructionError):
            encode()
    first = same.flatten(0, -2).shape[0] // 2
    same, each = same.flatten(0, -2), each.flatten(0, -2)
    torch.testing.assert_close(each[:first], same[:first], atol=SAME, rtol=0)
    assert (each - same)[first:].abs().max() > EFFECT
