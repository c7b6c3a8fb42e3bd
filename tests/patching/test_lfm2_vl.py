"""LFM2-VL: what pads an image belongs to that image, and is no image itself."""

from __future__ import annotations

import torch

from emma_adapter.models.registry import find_family
from tests.patching.test_families import SAME, feature_arguments, patched, train
from tests.support.zoo import ZOO, Row

ENTRY = ZOO["lfm2_vl"]


def test_images_of_many_sizes_have_one_instruction_each():
    model, adapter = patched(ENTRY)
    train(adapter)
    inner = find_family(model).inner(model)
    asked = ["is there a cat?", "how many dogs?", "yes?"]
    sizes = ((28, 56), (56, 56), (28, 28))  # with 2, 4 and 1 of 4 tokens
    pixels = feature_arguments(model, ENTRY.batch([Row(images=sizes)]))
    with torch.no_grad(), adapter.instruction(asked):
        together = inner.get_image_features(**pixels, return_dict=True).pooler_output
    assert [len(features) for features in together] == [2, 4, 1]
    for number, instruction in enumerate(asked):
        alone = {name: value[[number]] for name, value in pixels.items()}
        with torch.no_grad(), adapter.instruction(instruction):
            [expected] = inner.get_image_features(**alone, return_dict=True).pooler_output
        with torch.no_grad(), adapter.instruction("describe the left bird in detail"):
            [other] = inner.get_image_features(**alone, return_dict=True).pooler_output
        torch.testing.assert_close(together[number], expected, atol=SAME, rtol=0)
        assert (together[number] - other).abs().max() > 100 * SAME
