"""Maps of how far the adapter moved each visual token, in the place of the image where the token comes from."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, replace
from threading import Thread

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import nn

from emma_adapter import AnalysisError, EmmaConfig, PatchError, patch_model
from emma_adapter.analysis import TokenMap, compare, on_image, stitch, token_movement
from emma_adapter.analysis.observing import VisualEntry, observe
from tests.patching.test_llava import snapshot
from tests.support import tiny
from tests.support.budget import budget
from tests.support.tiny import PATCH
from tests.support.zoo import ZOO, Row

entries = pytest.mark.parametrize("entry", ZOO.values(), ids=ZOO)

#: (width, height) in pixels of a picture that a family's processor doesn't resize.
SIZES = {"llava": (28, 28), "vipllava": (28, 28), "paligemma": (28, 28), "gemma3": (56, 56), "llava_next": (56, 28)}
SIZES["llava_onevision"] = (126, 42)
# Smaller ones are enlarged.
SIZES["glm5_next"] = (112, 112)
# Made smaller, with a token for each patch.
SIZES["gemma4"] = (140, 98)
#: Rows and columns of the tiles, of families whose calls don't tell; the whole picture comes last, or first.
TILED = {"ovis2": (2, 1)} | dict.fromkeys(("internvl", "idefics3", "smolvlm", "cohere2_vision", "aya_vision"), (1, 2))
TILED |= dict.fromkeys(("minicpmv4_6", "minicpmv4_7", "lfm2_vl"), (1, 2))
WHOLE_FIRST = ("ovis2", "minicpmv4_6", "minicpmv4_7")
#: Families whose calls don't tell which tiles are of one picture, and which frames of one video.
MEDIA_ALONE = ("minicpmv4_6", "minicpmv4_7")
#: Families whose projector gets images padded: padding is an entry behind its image.
PADDED = ("lfm2_vl",)


@dataclass(frozen=True)
class Painted(Row):
    """One grey picture with one patch of noise, or none."""

    patch: tuple[int, int] | None = None

    def pictures(self) -> list[Image.Image]:
        [(width, height)] = self.images
        pixels = np.full((height, width, 3), 128, dtype=np.uint8)
        if self.patch is not None:
            y, x = (place * PATCH for place in self.patch)
            noise = np.random.default_rng(0).integers(0, 2, (PATCH, PATCH, 3)) * 255
            pixels[y : y + PATCH, x : x + PATCH] = noise
        return [Image.fromarray(pixels)]


def trained(entry, fusion: str = "attention", **changes):
    model = entry.model()
    adapter = patch_model(model, EmmaConfig(fusion=fusion, inner_dim=16, **changes), processor=entry.processor())
    tiny.train_randomly(nn.ParameterList(adapter.parameters()))
    return model, adapter


def map_of(values: np.ndarray, entry: VisualEntry) -> TokenMap:
    return TokenMap(values, values, values, values, entry.modality, entry.row, entry.medium, entry.index, entry.box)


def keep_patches_apart(model: nn.Module) -> None:
    """Let the layers of the vision tower add little to what they read, as random ones mix all patches."""
    for name, module in model.named_modules():
        last = r"(vision|visual).*(attn\.proj|out_proj|o_proj|projection_layer|fc2|down_proj)(\.linear)?$"
        if isinstance(module, nn.Linear) and re.search(last, name):
            with torch.no_grad():
                module.weight.mul_(0.1)


@entries
def test_a_patch_lies_in_the_map_where_it_lies_in_the_picture(entry):
    """Of pictures that differ in one patch, the vision encoder's outputs differ the most in a cell of that patch."""
    width, height = SIZES.get(entry.name, (112, 56))
    places = [(y, x) for y in range(height // PATCH) for x in range(width // PATCH)]
    rows = [Painted(images=((width, height),), patch=patch) for patch in (None, *places)]
    model, _ = trained(entry)
    keep_patches_apart(model)
    by_row: dict[int, list[VisualEntry]] = {}
    for one in observe(model, entry.batch(rows)):
        if one.index == 0 or entry.name not in PADDED:
            by_row.setdefault(one.row, []).append(one)
    assert len(by_row) == len(rows)
    for row, place in enumerate(places, start=1):
        maps = []
        for plain, painted in zip(by_row[0], by_row[row], strict=True):
            assert painted.grid == plain.grid is not None
            difference = (painted.before - plain.before).norm(dim=-1).reshape(painted.grid).numpy()
            maps.append(map_of(difference, painted))
        middle = [int((part + 0.5) * PATCH) for part in place]
        if entry.name in TILED:
            tile_rows, tile_columns = TILED[entry.name]
            *tiles, whole = [*maps[1:], maps[0]] if entry.name in WHOLE_FIRST else maps
            joined = stitch(tiles, tile_rows, tile_columns)
            pictures = [joined, whole.norm]
        else:
            for one in maps:
                alone = on_image([one], height, width)
                if not np.isnan(alone[tuple(middle)]) and one.box != (0, 0, 1, 1):
                    assert alone[tuple(middle)] == np.nanmax(alone) > 0
                elif one.box != (0, 0, 1, 1):
                    assert np.nanmax(alone) < 1e-3
            pictures = [on_image(maps, height, width), on_image(maps[:1], height, width)]
        for picture in pictures:
            # Where pictures are resized, a patch may cover several cells, some of them in part.
            cells = tuple(
                slice(part * PATCH * size // length, -(-(part + 1) * PATCH * size // length))
                for part, size, length in zip(place, picture.shape, (height, width), strict=True)
            )
            assert picture[cells].max() == picture.max() > 0, place


@entries
@pytest.mark.parametrize("fusion", ["attention", "linear", "modulation"])
def test_maps_are_what_the_formula_says_of_the_model_itself(entry, fusion):
    _, adapter = trained(entry, fusion)
    batch = entry.batch(
        [Row(images=((112, 56), (56, 56)), seed=1), Row(("is there a cat?",), images=((28, 84),), seed=2)]
    )
    seen = []
    handle = adapter.alignment.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    maps = token_movement(adapter, batch)
    handle.remove()
    [(before, after)] = [[part.detach().double().flatten(0, -2) for part in one] for one in seen]
    moved = (after - before).square().sum(-1).sqrt()
    lengths = [part.square().sum(-1).sqrt() for part in (before, after)]
    expected = {
        "norm": moved,
        "relative": moved / lengths[0],
        "cosine": (before * after).sum(-1) / (lengths[0] * lengths[1]),
        "gain": lengths[1] / lengths[0],
    }
    for field, values in expected.items():
        found = np.concatenate([getattr(one, field).flatten() for one in maps])
        assert found.dtype == np.float32
        # Which token lies where, the other test tells.
        np.testing.assert_allclose(np.sort(found), np.sort(values.numpy()), rtol=1e-4, atol=1e-5)
    assert [one.row for one in maps] == sorted(one.row for one in maps)
    assert {one.row for one in maps} == {0, 1}


@pytest.mark.parametrize("name", [name for name, entry in ZOO.items() if entry.videos])
def test_frames_of_videos(name):
    entry = ZOO[name]
    model, _ = trained(entry)
    images = ((56, 56),) if entry.mixes_media else ()
    maps = token_movement(model, entry.batch([Row(images=images, videos=(4,)), Row(videos=(4,), seed=3)]))
    frames = [one for one in maps if one.modality == "video"]
    assert [one.row for one in frames] == sorted([0] * (len(frames) // 2) + [1] * (len(frames) // 2))
    assert {one.box for one in frames} == {(0, 0, 1, 1)}
    if name in MEDIA_ALONE:
        assert [(one.medium, one.index) for one in frames] == [(number, 0) for number in range(8)]
        return
    assert [one.index for one in frames] == [*range(len(frames) // 2)] * 2
    assert {one.medium for one in frames} == {0, 1}
    assert {one.medium for one in maps if one.modality == "image"} == ({0} if images else set())


def test_an_untrained_adapter_moves_nothing(model, processor):
    patch_model(model, processor=processor)
    [one] = token_movement(model, tiny.chat_inputs([[tiny.user("is there a cat?")]]))
    assert (one.norm == 0).all() and (one.relative == 0).all()
    np.testing.assert_allclose(one.cosine, 1, atol=1e-6)
    np.testing.assert_allclose(one.gain, 1, atol=1e-6)


def question(text: str = "is there a cat?"):
    return tiny.chat_inputs([[tiny.user(text)]])


def test_the_instruction_may_be_named():
    model, _ = trained(ZOO["llava"])
    entry = ZOO["llava"]
    told = token_movement(model, entry.batch([Row(images=((28, 28),))]), instruction="how many dogs?")
    asked = token_movement(model, entry.batch([Row(("how many dogs?",), images=((28, 28),))]))
    other = token_movement(model, entry.batch([Row(images=((28, 28),))]))
    np.testing.assert_allclose(told[0].norm, asked[0].norm, atol=1e-6)
    assert np.abs(told[0].norm - other[0].norm).max() > 1e-3


def test_two_instructions_on_one_image():
    model, _ = trained(ZOO["qwen2_5_vl"])
    batch = ZOO["qwen2_5_vl"].batch([Row(images=((112, 56),))])
    [found] = compare(model, batch, "what is left?", "how many dogs?")
    for one, text in ((found.first, "what is left?"), (found.second, "how many dogs?")):
        [alone] = token_movement(model, batch, text)
        np.testing.assert_array_equal(one.norm, alone.norm)
    assert found.difference.shape == found.first.norm.shape == (4, 8)
    # The triangle inequality, and neither side of it is trivial.
    assert (found.difference <= found.first.relative + found.second.relative + 1e-5).all()
    assert found.difference.max() > 1e-2
    [same] = compare(model, batch, "what is left?", "what is left?")
    assert (same.difference == 0).all()


def test_the_model_is_left_as_it_was():
    model, adapter = trained(ZOO["llava"])
    batch = ZOO["llava"].batch([Row(images=((28, 28),))])
    model.train()
    model.model.vision_tower.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    with torch.no_grad(), adapter.instruction("x"):
        logits = model(**batch).logits
    # After a call: transformers installs hooks of its own in the first.
    before, weights = snapshot(model), copy.deepcopy(model.state_dict())
    rng = torch.get_rng_state()
    observe(model, batch, projected=True)
    with pytest.raises(AnalysisError), adapter.disabled():
        observe(model, batch, projected=True)
    with pytest.raises(Exception, match=r"shape|size|match"):
        observe(model, {**batch, "pixel_values": batch["pixel_values"][:, :, :5]}, projected=True)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert snapshot(model) == before
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    with torch.no_grad(), adapter.instruction("x"):
        assert torch.equal(model(**batch).logits, logits)


def test_other_threads_are_not_observed():
    model, _ = trained(ZOO["llava"])
    batch, seen = ZOO["llava"].batch([Row(images=((28, 28),))]), []
    with torch.no_grad():
        for state in [model._emma]:
            with state.observing(seen.append):
                thread = Thread(target=lambda: model(**batch))
                thread.start()
                thread.join()
                assert not seen
                model(**batch)
    assert len(seen) == 1
    model(**batch)
    assert len(seen) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl"])
def test_half_precision(name, dtype):
    model, _ = trained(ZOO[name])
    batch = ZOO[name].batch([Row(images=((56, 56),))])
    full = token_movement(model, batch)
    half = token_movement(model.to(dtype), batch)
    for one, other in zip(full, half, strict=True):
        assert other.norm.dtype == np.float32
        np.testing.assert_allclose(other.relative, one.relative, atol=0.1, rtol=0.1)


def test_wrappers_and_handles():
    model, adapter = trained(ZOO["llava"])
    batch = ZOO["llava"].batch([Row(images=((28, 28),))])
    want = token_movement(model, batch)[0].norm
    np.testing.assert_array_equal(token_movement(adapter, batch)[0].norm, want)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    np.testing.assert_array_equal(token_movement(wrapped, batch)[0].norm, want)


def test_tokens_that_form_no_grid():
    """CLIP's class token is kept."""
    model = tiny.llava(vision_feature_select_strategy="full", image_seq_length=5)
    patch_model(model)
    inputs = tiny.token_inputs([1])
    ids = inputs["input_ids"]
    place = int((ids[0] == 4).nonzero()[0])
    ids = torch.cat([ids[:, :place], torch.tensor([[4]]), ids[:, place:]], 1)
    [one] = token_movement(model, {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert one.norm.shape == (5,)
    with pytest.raises(AnalysisError, match="no grid"):
        on_image([one], 4, 4)


def test_not_finite_tokens_are_nan_in_their_place():
    model, _ = trained(ZOO["llava"])
    batch = ZOO["llava"].batch([Row(images=((28, 28),))])
    handle = model.model.multi_modal_projector.register_forward_pre_hook(_poison, prepend=True)
    [one] = token_movement(model, batch)
    handle.remove()
    for values in (one.norm, one.relative, one.cosine, one.gain):
        assert np.isnan(values).tolist() == [[False, False], [True, False]]


def _poison(module, args):
    broken = args[0].clone()
    broken[:, 2, 0] = torch.nan
    return (broken,)


def test_an_unpatched_model_is_told(model):
    with pytest.raises(PatchError):
        token_movement(model, question())


# ----------------------------------------------------------------------------------------------- pictures of maps


def a_map(values: np.ndarray, box=None) -> TokenMap:
    return TokenMap(values, values, values, values, "image", 0, 0, 0, box)


@settings(max_examples=budget(8, 25))
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))
def test_stitched_tiles_cut_apart_are_the_tiles(rows, columns, height, width):
    whole = np.arange(rows * height * columns * width, dtype=np.float32).reshape(rows * height, columns * width)
    tiles = [
        a_map(whole[y * height : (y + 1) * height, x * width : (x + 1) * width])
        for y in range(rows)
        for x in range(columns)
    ]
    np.testing.assert_array_equal(stitch(tiles, rows, columns, "gain"), whole)


@settings(max_examples=budget(8, 25))
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_a_map_painted_at_a_multiple_of_its_size_is_repeated(height, width, by_y, by_x):
    values = np.random.default_rng(0).random((height, width), dtype=np.float32)
    painted = on_image([a_map(values, (0, 0, 1, 1))], height * by_y, width * by_x)
    np.testing.assert_array_equal(painted, values.repeat(by_y, 0).repeat(by_x, 1))


def test_tiles_are_painted_over_the_whole_and_their_padding_is_left_out():
    whole = a_map(np.zeros((1, 1), np.float32), (0, 0, 1, 1))
    tile = a_map(np.array([[1, 2]], np.float32), (-0.5, 0.5, 0.5, 1.5))
    painted = on_image([tile, whole], 2, 4, "norm")
    np.testing.assert_array_equal(painted, [[0, 0, 1, 1], [0, 0, 0, 0]])
    np.testing.assert_array_equal(np.isnan(on_image([replace(tile)], 2, 4)), [[1, 1, 0, 0], [1, 1, 1, 1]])
