"""GLM-V: videos, whose frames are written as pictures, and but for GLM-5.3 in no call with pictures."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from emma_adapter import RoutingError
from emma_adapter.models.families import ProjectorCall
from emma_adapter.models.registry import find_family
from tests.patching.test_families import EFFECT, FUSIONS, SAME, generated, last_logits, patched, train, trained
from tests.support.zoo import ZOO, Row

# Of the square of pixels that is one token.
SIDE = 28
NAMES = ("glm4v", "glm46v", "glm4v_moe", "glm_ocr", "glm5_next")
each = pytest.mark.parametrize("name", NAMES)
VIDEOS = (Row(("is there a cat?",), videos=(3,), seed=1), Row(("yes?",)), Row(("how many?",), videos=(5, 2), seed=2))


@each
@pytest.mark.parametrize("fusion", FUSIONS)
def test_videos_meet_the_instruction_of_their_row(name, fusion):
    entry = ZOO[name]
    batch = entry.batch(VIDEOS)
    before = last_logits(entry.model(), batch)
    model, adapter = patched(entry, fusion)
    assert torch.equal(last_logits(model, batch), before)
    train(adapter)
    changed = last_logits(model, batch)
    effect = (changed - before).abs().amax(dim=1)
    assert effect[[0, 2]].min() > EFFECT
    assert effect[1] == 0
    torch.testing.assert_close(generated(model, batch), changed, atol=SAME, rtol=0)
    for number, row in enumerate(VIDEOS):
        torch.testing.assert_close(changed[[number]], last_logits(model, entry.batch([row])), atol=SAME, rtol=0)
    told = last_logits(model, batch, instruction=["yes"] * 3)
    other = last_logits(model, batch, instruction=["yes", "yes", "what colour is the left bird?"])
    assert ((other - told).abs().amax(dim=1) > EFFECT).tolist() == [False, False, True]


class OtherFrames(Row):
    """Shows the same videos, but for frames 2 and 3 of the first."""

    def clips(self) -> list[np.ndarray]:
        first, *others = super().clips()
        return [np.concatenate([first[:2], 255 - first[2:4], first[4:]]), *others]


def projected(model: nn.Module, batch: dict) -> Tensor:
    """The projector's input in a call."""
    seen: list[Tensor] = []
    handle = find_family(model).projector(model.model).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    last_logits(model, batch)
    handle.remove()
    [tokens] = seen
    return tokens


@each
def test_tokens_of_a_frame_are_where_the_layout_says(name):
    """Frames don't see each other, and two of them are one entry."""
    entry = ZOO[name]
    model = entry.model()
    row = Row(videos=(6, 3))
    batch, other = entry.batch([row]), entry.batch([OtherFrames(videos=row.videos)])
    before, after = projected(model, batch), projected(model, other)
    changed = (before != after).any(dim=1)
    sizes = {"video_grid_thw": batch["video_grid_thw"]}
    layout = find_family(model).layout(ProjectorCall(model.model, "video", before, sizes, None, None))
    lengths = [height * width for height, width in layout.grids]
    assert layout.entries == [3, 2] and sum(layout.tokens) == sum(lengths) == len(before)
    assert [bool(part.all()) for part in changed.split(lengths)] == [False, True, False, False, False]
    assert [bool(part.any()) for part in changed.split(lengths)] == [False, True, False, False, False]


class OtherSquare(Row):
    """Shows the same pictures, but for a token's square in the second row and the third column of the first."""

    def pictures(self) -> list[Image.Image]:
        first, *others = super().pictures()
        pixels = np.array(first)
        pixels[SIDE : 2 * SIDE, 2 * SIDE : 3 * SIDE] = 255 - pixels[SIDE : 2 * SIDE, 2 * SIDE : 3 * SIDE]
        return [Image.fromarray(pixels), *others]


@each
def test_tokens_come_row_by_row(name):
    """One square of a picture is one token, in a tower whose patches don't see each other."""
    entry = ZOO[name]
    model = entry.model()
    for block in model.model.visual.blocks:
        nn.init.zeros_(block.attn.proj.weight)
    # Of sizes that the processor keeps.
    grids = [(2, 8), (4, 4)] if name == "glm5_next" else [(2, 4), (3, 1)]
    row = Row(images=tuple((width * SIDE, height * SIDE) for height, width in grids))
    batch, other = entry.batch([row]), entry.batch([OtherSquare(images=row.images)])
    before, after = projected(model, batch), projected(model, other)
    sizes = {"image_grid_thw": batch["image_grid_thw"]}
    layout = find_family(model).layout(ProjectorCall(model.model, "image", before, sizes, None, None))
    assert layout.grids == grids and layout.orders is None
    assert (before != after).any(dim=1).nonzero().flatten().tolist() == [grids[0][1] + 2]


@pytest.mark.parametrize("modality", ["image", "video"])
def test_a_grid_that_is_missing_is_named(modality):
    model = ZOO["glm4v"].model()
    call = ProjectorCall(model.model, modality, torch.zeros(4, 1), {}, None, None)
    with pytest.raises(RoutingError, match=f"{modality}_grid_thw"):
        find_family(model).layout(call)


@pytest.mark.parametrize("name", [name for name in NAMES if not ZOO[name].mixes_media])
def test_pictures_and_videos_in_one_call_are_refused_as_without_an_adapter(name):
    entry = ZOO[name]
    batch = entry.batch([replace(VIDEOS[0], images=((56, 56),))])
    for model in (entry.model(), trained(entry)[0]):
        with pytest.raises(ValueError, match="tokens do not match"):
            model(**batch)
