"""Several samples in one row: each image meets the instruction of its own sample."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emma_adapter import EmmaConfig, InstructionError, patch_model
from emma_adapter.instructions.packed_samples import find_samples
from tests.support import tiny

IMAGE = [4] * tiny.TOKENS_PER_IMAGE
SAMPLES = [[1, 10, *IMAGE, 20, 2], [1, 11, *IMAGE, *IMAGE, 21, 22, 2], [1, 12, 23, 2], [1, 13, *IMAGE, 24, 25, 26, 2]]


def batch_of(rows: list[list[int]], *, padding_side: str = "right") -> dict[str, torch.Tensor]:
    """Rows of numbers of :data:`SAMPLES`, packed, with positions that begin anew."""
    longest = max(sum(len(SAMPLES[number]) for number in row) for row in rows)
    ids = torch.full((len(rows), longest), 3)
    positions, mask = torch.zeros_like(ids), torch.zeros_like(ids)
    for i, row in enumerate(rows):
        tokens = [token for number in row for token in SAMPLES[number]]
        where = slice(0, len(tokens)) if padding_side == "right" else slice(longest - len(tokens), longest)
        ids[i, where], mask[i, where] = torch.tensor(tokens), 1
        positions[i, where] = torch.tensor([place for number in row for place in range(len(SAMPLES[number]))])
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def pictures(rows: list[list[int]]) -> torch.Tensor:
    made = {}
    for number, sample in enumerate(SAMPLES):
        generator = torch.Generator().manual_seed(number)
        made[number] = torch.randn(sample.count(4) // len(IMAGE), 3, 28, 28, generator=generator)
    return torch.cat([made[number] for row in rows for number in row])


@pytest.fixture
def model():
    model = tiny.llava()
    tiny.train_randomly(patch_model(model, EmmaConfig(inner_dim=16)).alignment)
    return model


@torch.no_grad()
def image_features(model, inputs, **more):
    return tiny.image_features(model(**inputs, **more))


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("rows", [[[0, 1]], [[0, 1, 2, 3]], [[0, 2], [3, 1]], [[2, 0], [1]]])
def test_packed_images_meet_the_instruction_of_their_sample(model, rows, padding_side):
    packed = image_features(model, batch_of(rows, padding_side=padding_side), pixel_values=pictures(rows))
    alone = [
        image_features(model, batch_of([[number]]), pixel_values=pictures([[number]]))
        for row in rows
        for number in row
        if 4 in SAMPLES[number]
    ]
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-5, rtol=0)
    unpacked = {name: value for name, value in batch_of(rows).items() if name != "position_ids"}
    mixed = image_features(model, unpacked, pixel_values=pictures(rows))
    assert (mixed - packed).abs().max() > 1e-3


def test_sample_numbers_in_the_attention_mask_tell_samples_apart(model):
    inputs = batch_of([[0, 1, 3]])
    expected = image_features(model, inputs, pixel_values=pictures([[0, 1, 3]]))
    del inputs["position_ids"]
    lengths = torch.tensor([len(SAMPLES[number]) for number in (0, 1, 3)])
    inputs["attention_mask"] = torch.arange(1, 4).repeat_interleave(lengths)[None]
    torch.testing.assert_close(
        image_features(model, inputs, pixel_values=pictures([[0, 1, 3]])), expected, atol=1e-5, rtol=0
    )


def test_positions_of_m_rope(model):
    """``[3, B, L]``: the temporal positions, of which those of an image are equal, decide."""
    plain = batch_of([[0, 1]])
    positions = plain["position_ids"]
    # Text before an image, the image, text after it.
    temporal = torch.where(plain["input_ids"] == 4, 2, torch.where(positions < 2, positions, 2 + positions))
    arguments = {"attention_mask": plain["attention_mask"]}
    samples = find_samples({**arguments, "position_ids": torch.stack([temporal] * 3)}, (1, 21), required=True)
    assert samples.spans == find_samples({**arguments, "position_ids": positions}, (1, 21), required=True).spans


def test_labels_and_assistant_masks_are_unpacked_too(model):
    inputs = batch_of([[0, 1]])
    answers = torch.zeros_like(inputs["input_ids"])
    answers[0, [7, 19, 20]] = 1  # 2 ends both samples, and 22 is an answer
    other = inputs["input_ids"].clone()
    other[0, 19] = 60
    pixels = pictures([[0, 1]])
    model.train()
    for told in (
        {"labels": torch.where(answers.bool(), inputs["input_ids"], -100)},
        {"assistant_masks": answers},
    ):
        before = tiny.image_features(model(**inputs, pixel_values=pixels, **told))
        after = tiny.image_features(model(**{**inputs, "input_ids": other}, pixel_values=pixels, **told))
        assert torch.equal(before, after)
    untold = tiny.image_features(model.eval()(**{**inputs, "input_ids": other}, pixel_values=pixels))
    assert not torch.equal(untold, before)


def test_explicit_instructions_are_one_per_sample(model):
    inputs = batch_of([[0, 1], [3]])
    pixels = pictures([[0, 1], [3]])
    told = torch.tensor([[31], [32], [33]])
    packed = image_features(model, inputs, pixel_values=pixels, instruction=told)
    alone = [
        image_features(model, batch_of([[number]]), pixel_values=pictures([[number]]), instruction=told[i : i + 1])
        for i, number in enumerate((0, 1, 3))
    ]
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-5, rtol=0)
    with pytest.raises(InstructionError, match="3"):
        model(**inputs, pixel_values=pixels, instruction=told[:2])


@pytest.mark.parametrize(
    "sign",
    [
        {"cu_seq_lens_q": torch.tensor([0, 8, 21])},
        {"seq_idx": torch.zeros(1, 21)},
        {"attention_mask": torch.zeros(1, 1, 21, 21)},
    ],
    ids=["cu_seq_lens", "seq_idx", "mask"],
)
def test_packing_without_positions_is_refused(model, sign):
    inputs = {"input_ids": batch_of([[0, 1]])["input_ids"], "pixel_values": pictures([[0, 1]]), **sign}
    with pytest.raises(InstructionError, match=r"position_ids .*instruction="):
        model(**inputs)
    model(**inputs, instruction=torch.tensor([[5]]))


lengths = st.lists(st.integers(2, 6), min_size=1, max_size=4)


@given(st.lists(lengths, min_size=1, max_size=3), st.sampled_from(["left", "right"]), st.booleans())
def test_samples_begin_where_positions_go_back(rows, padding_side, with_mask):
    width = max(map(sum, rows))
    positions = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(positions)
    expected = []
    for i, row in enumerate(rows):
        start = 0 if padding_side == "right" else width - sum(row)
        for length in row:
            positions[i, start : start + length] = torch.arange(length)
            mask[i, start : start + length] = 1
            expected.append({(i, place) for place in range(start, start + length)})
            start += length
    arguments = {"position_ids": positions, **({"attention_mask": mask} if with_mask else {})}
    samples = find_samples(arguments, (len(rows), width), required=True)
    if all(len(row) == 1 for row in rows) and (with_mask or padding_side == "left"):
        assert samples is None
        return
    if samples is None:
        assert all(len(row) == 1 for row in rows)
        return
    found = [{(row, place) for place in range(start, end)} for row, start, end in samples.spans]
    for sample in expected:
        [home] = [span for span in found if sample <= span]
        assert not any(home & other for other in expected if other != sample)
