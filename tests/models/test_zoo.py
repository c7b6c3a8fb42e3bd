"""The zoo is what other tests stand on: its models, as transformers made them, treat every row as if it were alone."""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import cache

import pytest
import torch
import transformers
from packaging.version import Version
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from emma_adapter.models.registry import family_names
from tests.support.zoo import ZOO, Entry, Row, answered

TOLERANCE = 2e-5
ROWS = [
    Row(("how many dogs are there?",), images=((56, 56),), seed=1),
    Row(("what is left?", "is there a cat?"), images=((28, 84), (112, 56)), seed=2, system="A chat.", late_images=True),
    Row(("yes, no, two, three.",), seed=3),
    Row(images=((84, 28), (60, 90), (30, 30)), seed=4),
]
entries = pytest.mark.parametrize("entry", ZOO.values(), ids=ZOO.keys())
video_entries = pytest.mark.parametrize("entry", [e for e in ZOO.values() if e.videos], ids=lambda entry: entry.name)


@cache
def model_of(entry: Entry):
    return entry.model()


@torch.no_grad()
def last_logits(entry: Entry, rows: list[Row], padding_side: str = "left") -> torch.Tensor:
    """Of each row the logits at its last token that is no padding."""
    batch = entry.batch(rows, padding_side=padding_side)
    last = (batch["attention_mask"] * torch.arange(batch["attention_mask"].shape[1])).argmax(1)
    return model_of(entry)(**batch).logits[torch.arange(len(rows)), last]


def assert_rows_stand_alone(entry: Entry, rows: list[Row], padding_side: str = "left") -> None:
    together = last_logits(entry, rows, padding_side)
    for number, row in enumerate(rows):
        alone = last_logits(entry, [row])[0]
        torch.testing.assert_close(together[number], alone, atol=TOLERANCE, rtol=0, msg=lambda m, n=number: f"{n}: {m}")


#: Models that have tests of their own: their code comes with the checkpoint, or can't do what these tests ask.
APART = {
    *("internvl_chat", "llava_llama", "llava_mistral", "llava_qwen"),
    *("florence2", "mllama", "nemotron_h_omni", "phi4_multimodal"),
}


#: Types whose first releases can't do what these tests ask, as transformers wrote them.
FAULTY = {"kimi_k25", "minicpmv4_6"} if Version(transformers.__version__) < Version("5.18") else set()


def test_every_family_is_here():
    """But those that this release of transformers doesn't have, or is the first to have, with faults."""
    here = {entry.model().config.model_type for entry in ZOO.values()}
    known = {name for name in set(family_names()) - APART if name in CONFIG_MAPPING}
    assert here == known - FAULTY


@entries
def test_an_entry_is_what_it_says(entry):
    model = model_of(entry)
    arguments = inspect.signature(model.forward).parameters
    assert model.config.model_type == entry.name.removesuffix("_pixtral")
    assert type(model).__name__.endswith("ForConditionalGeneration")
    assert not model.training
    assert entry.videos == ("pixel_values_videos" in arguments)
    placeholder = model.config.image_token_id
    counts = {
        (entry.batch([Row(images=(size,))])["input_ids"] == placeholder).sum().item()
        for size in ((56, 56), (28, 112), (84, 112))
    }
    assert 0 not in counts
    assert entry.dynamic == (len(counts) > 1)
    assert set(entry.batch(ROWS)) <= set(arguments)


@pytest.mark.nightly
@entries
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_a_row_of_a_batch_is_the_row_alone(entry, padding_side):
    assert_rows_stand_alone(entry, ROWS, padding_side)


@pytest.mark.nightly
@entries
def test_a_batch_may_begin_with_a_row_without_pictures_or_have_no_other(entry):
    assert_rows_stand_alone(entry, [ROWS[2], ROWS[0]])
    assert "pixel_values" not in entry.batch([ROWS[2]] * 2)
    assert_rows_stand_alone(entry, [ROWS[2], Row(("no.", "yes?"))])


@pytest.mark.nightly
@entries
def test_pictures_are_seen(entry):
    other = [replace(row, seed=row.seed + 10) for row in ROWS]
    effect = (last_logits(entry, ROWS) - last_logits(entry, other)).abs().amax(1)
    assert (effect[[0, 1, 3]] > 0.05).all()
    assert effect[2] < TOLERANCE


@pytest.mark.nightly
@video_entries
def test_pictures_and_videos_in_one_row(entry):
    frames = (3, 3, 3) if entry.stacks_videos else (2, 5, 3)
    if not entry.mixes_media:
        pytest.skip("transformers itself can't, see the contract")
    rows = [
        Row(images=((56, 56),), videos=frames[:1], seed=1),
        ROWS[2],
        ROWS[1],
        Row(videos=frames[1:], seed=5),
    ]
    batch = entry.batch(rows)
    assert (
        {"pixel_values", "pixel_values_videos"}
        <= set(batch)
        <= set(inspect.signature(model_of(entry).forward).parameters)
    )
    assert_rows_stand_alone(entry, rows)
    other = [replace(row, seed=row.seed + 10) for row in rows]
    effect = (last_logits(entry, rows) - last_logits(entry, other)).abs().amax(1)
    assert (effect[[0, 2, 3]] > 0.05).all()


@pytest.mark.nightly
def test_videos_are_refused_where_there_are_none():
    with pytest.raises(ValueError, match="gemma3"):
        ZOO["gemma3"].batch([Row(videos=(2,))])


@pytest.mark.nightly
@entries
def test_generate_runs_to_max_new_tokens(entry):
    batch = entry.batch(ROWS)
    made = model_of(entry).generate(**batch, max_new_tokens=2, do_sample=False)
    assert made.shape == (len(ROWS), batch["input_ids"].shape[1] + 2)
    assert torch.equal(made[:, -2], last_logits(entry, ROWS).argmax(-1))


@pytest.mark.nightly
@entries
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_only_the_answer_is_supervised(entry, padding_side):
    batch = answered(entry, ROWS, "a red bird.", padding_side=padding_side)
    words = entry.processor().tokenizer
    assert batch["attention_mask"][:, 0 if padding_side == "left" else -1].min() == 0
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        supervised = labels != -100
        assert torch.equal(labels[supervised], ids[supervised])
        assert words.decode(labels[supervised], skip_special_tokens=True).strip() == "a red bird."
    assert torch.isfinite(model_of(entry)(**batch).loss)


@pytest.mark.nightly
@entries
def test_a_model_is_made_of_its_seed(entry):
    torch.manual_seed(3)
    first, again, other = entry.model(5), entry.model(5), entry.model(6)
    rest = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(rest, torch.rand(1)), "making a model moved the global random state"
    values = [torch.cat([p.flatten() for p in model.parameters()]) for model in (first, again, other)]
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])


@pytest.mark.nightly
@entries
def test_changing_a_processor_changes_nobody_elses(entry):
    before = entry.batch(ROWS)["input_ids"]
    entry.processor().tokenizer.add_tokens(["dogs", "cat"])
    assert torch.equal(entry.batch(ROWS)["input_ids"], before)


@pytest.mark.nightly
def test_a_picture_depends_on_its_row_and_place_only():
    sizes = ((8, 4), (8, 4))
    first, second = Row(images=sizes).pictures()
    assert first.size == (8, 4)
    assert first.tobytes() != second.tobytes()
    assert first.tobytes() == Row(("other",), images=sizes[:1], system="s").pictures()[0].tobytes()
    assert first.tobytes() != Row(images=sizes, seed=1).pictures()[0].tobytes()


@pytest.mark.nightly
@pytest.mark.parametrize("late", [False, True])
def test_media_are_in_the_first_or_in_the_last_user_turn(late):
    talk = Row(("a", "b"), images=((8, 8),), videos=(2,), system="s", late_images=late).messages("c")
    assert [message["role"] for message in talk] == ["system", "user", "assistant", "user", "assistant"]
    kinds = [[part["type"] for part in message["content"]] for message in talk]
    assert kinds[3 if late else 1] == ["image", "video", "text"]
    assert sum(map(len, kinds)) == 7
