"""MiniCPM-V: with or without the merging of patches in its vision tower."""

from __future__ import annotations

import pytest
import torch

from tests.patching.test_families import EFFECT, SAME, last_logits, trained
from tests.support.zoo import ZOO, Row

ROWS = (
    Row(("is there a cat?",), images=((112, 56),), seed=1),
    Row(("how many dogs?",), images=((56, 28), (56, 56)), seed=2),
)


@pytest.mark.parametrize("name", [name for name in ("minicpmv4_6", "minicpmv4_7") if name in ZOO])
def test_four_times_the_tokens(name):
    entry = ZOO[name]
    model, adapter = trained(entry)
    processor = entry.processor()

    def batch(*rows: Row):
        return processor(
            text=[processor.apply_chat_template(row.messages(None), add_generation_prompt=True) for row in rows],
            images=[picture for row in rows for picture in row.pictures()],
            padding=True,
            padding_side="left",
            return_tensors="pt",
            downsample_mode="4x",
        )

    tokens = (batch(*ROWS)["input_ids"] == processor.image_token_id).sum()
    assert tokens == 4 * (entry.batch(ROWS)["input_ids"] == processor.image_token_id).sum()
    together = last_logits(model, batch(*ROWS), downsample_mode="4x")
    for number, row in enumerate(ROWS):
        alone = last_logits(model, batch(row), downsample_mode="4x")
        torch.testing.assert_close(together[[number]], alone, atol=SAME, rtol=0)
        with adapter.disabled():
            assert (last_logits(model, batch(row), downsample_mode="4x") - alone).abs().max() > EFFECT
