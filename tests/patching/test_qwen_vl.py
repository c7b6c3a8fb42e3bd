"""What only Qwen-VL has: the order of its patches, and deepstack."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

from emma_adapter import (
    CheckpointError,
    ConfigError,
    EmmaAlignment,
    EmmaConfig,
    MediaLayout,
    block_order,
    load_adapter,
    patch_model,
    unpatch_model,
    window_order,
)
from emma_adapter.instructions.pipeline import InstructionTokens
from emma_adapter.patching.routing import RoutedInstruction
from tests.patching.test_families import inner_of
from tests.support import tiny
from tests.support.budget import budget
from tests.support.zoo import ZOO, Row

DEEPSTACK = ("qwen3_vl", "qwen3_vl_moe", "qwen3_omni_moe_thinker")
ROWS = (Row(("is there a cat?",), images=((56, 56), (28, 84)), seed=1), Row(("how many?",), videos=(3,), seed=2))


# ----------------------------------------------------------------------------------------------------------- order


@settings(max_examples=budget(10, 30))
@given(blocks=st.tuples(st.integers(1, 6), st.integers(1, 6)), merge=st.sampled_from([1, 2, 3]))
def test_blocks_are_in_the_order_of_the_image_processor(blocks, merge):
    """Each patch of a picture has its number as colour."""
    height, width = blocks[0] * merge, blocks[1] * merge
    numbers = torch.arange(height * width, dtype=torch.float32).view(1, height, width).expand(3, -1, -1)
    processor = Qwen2VLImageProcessor(
        patch_size=1, temporal_patch_size=1, merge_size=merge, do_rescale=False, do_normalize=False, do_resize=False
    )
    made = processor(images=[numbers], return_tensors="pt", input_data_format="channels_first")
    assert made["image_grid_thw"].tolist() == [[1, height, width]]
    assert torch.equal(made["pixel_values"][:, 0].long(), block_order((height, width), merge))


def transformers_window_index(grid: Tensor, *, merge: int, window_size: int, patch: int) -> Tensor:
    if hasattr(modeling_qwen2_5_vl, "get_vision_window_index"):
        index, _ = modeling_qwen2_5_vl.get_vision_window_index(
            grid, spatial_merge_size=merge, window_size=window_size, patch_size=patch, kwargs={}
        )
    else:
        sizes = {"window_size": window_size, "spatial_merge_size": merge, "patch_size": patch}
        tower = SimpleNamespace(**sizes, spatial_merge_unit=merge**2)
        index, _ = modeling_qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel.get_window_index(tower, grid)
    return torch.as_tensor(index)


@settings(max_examples=budget(20, 60))
@given(
    blocks=st.tuples(st.integers(1, 3), st.integers(1, 11), st.integers(1, 11)),
    window=st.integers(1, 5),
    merge=st.sampled_from([1, 2]),
    surplus=st.integers(0, 9),
)
def test_windows_are_in_the_order_of_transformers(blocks, window, merge, surplus):
    frames, rows, columns = blocks
    grid = (rows * merge, columns * merge)
    index = transformers_window_index(
        torch.tensor([[frames, *grid]]), merge=merge, window_size=window * merge * 14 + surplus, patch=14
    )
    places = block_order(grid, merge).view(-1, merge**2)
    number = rows * columns
    for frame in range(frames):
        own = index[frame * number : (frame + 1) * number] - frame * number
        assert torch.equal(places[own].flatten(), window_order(grid, merge, window))


@settings(max_examples=budget(6, 20))
@given(grids=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=5), data=st.data())
def test_packed_entries_are_aligned_as_pictures_of_their_own(grids, data):
    """Whatever the order of their tokens, and whichever of them share a grid."""
    config = EmmaConfig(visual_dim=8, instruction_dim=6, visual_grid=(3, 3), inner_dim=8, num_heads=2)
    alignment = EmmaAlignment(config).double()
    tiny.train_randomly(alignment)
    instruction = InstructionTokens(torch.randn(3, 4, 6, dtype=torch.float64), torch.rand(3, 4) > 0.3)
    rows = data.draw(st.lists(st.integers(0, 2), min_size=len(grids), max_size=len(grids)))
    orders = {(h, w): torch.randperm(h * w) for h, w in grids}
    pictures = [torch.randn(1, h * w, 8, dtype=torch.float64) for h, w in grids]
    packed = torch.cat([picture[0, orders[grid]] for picture, grid in zip(pictures, grids, strict=True)])
    layout = MediaLayout(tokens=[1] * len(grids), entries=[1] * len(grids), grids=grids, packed=True, orders=orders)
    with torch.no_grad():
        routed = RoutedInstruction(layout, torch.tensor(rows), "default", instruction, "image", projector_merge=2)
        out = routed.align(alignment, packed)
        parts = out.split([h * w for h, w in grids])
        for part, picture, grid, row in zip(parts, pictures, grids, rows, strict=True):
            own = instruction.of_rows(torch.tensor([row]))
            alone = alignment(picture, own.tokens, own.mask, grid=grid)[0]
            torch.testing.assert_close(part, alone[orders[grid]], atol=1e-12, rtol=0)


# ------------------------------------------------------------------------------------------------------- deepstack


def patched(name: str, **changes):
    model = ZOO[name].model()
    adapter = patch_model(model, EmmaConfig(inner_dim=16, **changes), processor=ZOO[name].processor())
    return model, adapter


def train(adapter) -> None:
    tiny.train_randomly(nn.ParameterList(adapter.parameters()))


@torch.no_grad()
def logits(model: nn.Module, batch) -> Tensor:
    return model(**batch).logits


@torch.no_grad()
def features(model: nn.Module, adapter, batch) -> tuple[Tensor, list[Tensor]]:
    """What the projector gives, and what each deepstack projector does."""
    with adapter.instruction("is there a cat?"):
        out = inner_of(model).get_image_features(batch["pixel_values"], batch["image_grid_thw"], return_dict=True)
    return torch.cat(out.pooler_output), [torch.cat(tuple(level)) for level in out.deepstack_features]


@pytest.mark.parametrize("name", DEEPSTACK)
@pytest.mark.parametrize("align_deepstack", [False, True])
def test_deepstack_features_are_aligned_if_asked_for(name, align_deepstack):
    model, adapter = patched(name, align_deepstack=align_deepstack)
    batch = ZOO[name].batch(ROWS[:1])
    with adapter.disabled():
        before, levels_before = features(model, adapter, batch)
    train(adapter)
    after, levels_after = features(model, adapter, batch)
    assert (after - before).abs().max() > 1e-2
    assert len(levels_after) > 1
    for one, other in zip(levels_before, levels_after, strict=True):
        assert torch.equal(one, other) != align_deepstack


@pytest.mark.parametrize("name", DEEPSTACK)
@pytest.mark.parametrize("projector", [False, True])
def test_aligned_deepstack_saves_loads_and_comes_off(name, projector, tmp_path):
    batch = ZOO[name].batch(ROWS)
    model, adapter = patched(name, align_deepstack=True)
    plain, fewer = logits(ZOO[name].model(), batch), patched(name)[1].num_parameters()
    levels = len(model.config.vision_config.deepstack_visual_indexes)
    assert adapter.num_parameters() == (1 + levels) * fewer
    assert torch.equal(logits(model, batch), plain)
    adapter.train_only(projector=projector)
    train(adapter)
    if projector:
        merger = adapter._state.current.own_projectors()["deepstack.1."].projector
        with torch.no_grad():
            next(weight for weight in merger.parameters() if weight.ndim == 2).add_(0.1)
    trained = logits(model, batch)
    with adapter.disabled():
        assert torch.equal(logits(model, batch), plain)
    adapter.save_pretrained(tmp_path)
    other = ZOO[name].model()
    loaded = load_adapter(other, tmp_path, processor=ZOO[name].processor())
    assert loaded.config.align_deepstack
    assert torch.equal(logits(other, batch), trained)
    for each in (model, other):
        unpatch_model(each)
        assert torch.equal(logits(each, batch), plain)
        assert not [key for key in each.state_dict() if ".emma." in key]


def test_deepstack_where_there_is_none_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="align_deepstack"):
        patch_model(ZOO["qwen2_vl"].model(), EmmaConfig(align_deepstack=True))
    patched("qwen3_vl", align_deepstack=True)[1].save_pretrained(tmp_path)
    other = ZOO["qwen3_vl"].model()
    del other.model.visual.deepstack_merger_list[-1]
    with pytest.raises(CheckpointError, match="2 deepstack projectors; this model has 1"):
        load_adapter(other, tmp_path)
