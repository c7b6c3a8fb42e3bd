"""The behaviour contract: what a patched model of any family keeps to, whatever the fusion and the encoder."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from packaging.version import Version
from torch import Tensor, nn

from emma_adapter import EmmaConfig, InstructionError, RoutingError, load_adapter, patch_model, unpatch_model
from emma_adapter.models.registry import find_family
from tests.patching.test_llava import WordHashEncoder, snapshot
from tests.support import tiny
from tests.support.budget import budget, combinations, some
from tests.support.zoo import ZOO, Entry, Row, answered

EFFECT = 5e-4  # what a trained adapter changes at least, far above rounding
SAME = 3e-5
NEWER_THAN_5_17 = Version(transformers.__version__) >= Version("5.18")
FUSIONS = ("attention", "linear", "modulation")
ENCODERS = ("llm", "clip", "custom")
POLICIES = ("last_turn", "shortest_turn", "all_turns")
ASSISTANTS = ("lookup", "model", "patched model")
ROWS = (
    Row(("how many dogs are there?",), images=((56, 56),), seed=1),
    Row(("what is left?", "is there a cat?"), images=((28, 84), (112, 56)), seed=2, system="A chat."),
    Row(("yes, no, two, three.",), seed=3),
    Row(images=((84, 28), (60, 90), (30, 30)), seed=4),
)
WITH_IMAGES = [0, 1, 3]


def _name(value: Any) -> str:
    return getattr(value, "name", value)


entries = pytest.mark.parametrize("entry", ZOO.values(), ids=ZOO)
video_entries = pytest.mark.parametrize("entry", [e for e in ZOO.values() if e.videos], ids=lambda entry: entry.name)
fusions = pytest.mark.parametrize("fusion", FUSIONS)
each_with_fusions_and_encoders = pytest.mark.parametrize(
    ("entry", "fusion", "encoder"), combinations(ZOO.values(), FUSIONS, ENCODERS), ids=_name
)


@cache
def batch_of(entry: Entry, rows: tuple[Row, ...], padding_side: str = "left") -> dict[str, Any]:
    return entry.batch(rows, padding_side=padding_side)


def patched(entry: Entry, fusion: str = "attention", encoder: str = "llm", clip_folder=None, **changes: Any):
    model = entry.model()
    given = {"llm": "llm", "clip": str(clip_folder), "custom": WordHashEncoder()}[encoder]
    config = EmmaConfig(fusion=fusion, inner_dim=16, **changes)
    adapter = patch_model(model, config, processor=entry.processor(), instruction_encoder=given)
    return model, adapter


def train(adapter) -> None:
    tiny.train_randomly(nn.ParameterList(adapter.parameters()))


@cache
def trained(entry: Entry):
    """A model that tests share: none may change it."""
    model, adapter = patched(entry)
    train(adapter)
    return model, adapter


@torch.no_grad()
def last_logits(model: nn.Module, batch: dict[str, Any], **more: Any) -> Tensor:
    """Of each row the logits at its last token that is no padding."""
    last = (batch["attention_mask"] * torch.arange(batch["attention_mask"].shape[1])).argmax(1)
    return model(**batch, **more).logits[torch.arange(len(last)), last]


def generated(model: nn.Module, batch: dict[str, Any], **more: Any) -> Tensor:
    """The logits of the first token that ``generate`` writes."""
    settings = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    return model.generate(**batch, **{**settings, **more}).logits[0]


def inner_of(model: nn.Module) -> nn.Module:
    return find_family(model).inner(model)


def feature_arguments(model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    """Of a batch, what ``get_image_features`` takes; older transformers don't name ``image_sizes`` in every family."""
    names = [*inspect.signature(inner_of(model).get_image_features).parameters, "image_sizes"]
    return {name: batch[name] for name in names if name in batch}


def aligned(model: nn.Module, adapter, run) -> list[Tensor]:
    """What the adapter returned while ``run`` ran."""
    seen: list[Tensor] = []
    handle = adapter.alignment.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    try:
        run()
    finally:
        handle.remove()
    return seen


def assert_rows_stand_alone(entry: Entry, model: nn.Module, rows: Sequence[Row], padding_side: str = "left") -> None:
    together = last_logits(model, entry.batch(rows, padding_side=padding_side))
    for number, row in enumerate(rows):
        torch.testing.assert_close(together[[number]], last_logits(model, entry.batch([row])), atol=SAME, rtol=0)


# -------------------------------------------------------------------------------------- family x fusion x encoder


@each_with_fusions_and_encoders
def test_identity_on_off_on_and_unpatched(entry, fusion, encoder, clip_folder):
    model = entry.model()
    batch = batch_of(entry, ROWS)
    before = last_logits(model, batch)
    left = snapshot(model)
    model, adapter = patched(entry, fusion, encoder, clip_folder)
    assert torch.equal(last_logits(model, batch), before)
    train(adapter)
    changed = last_logits(model, batch)
    effect = (changed - before).abs().amax(dim=1)
    assert effect[WITH_IMAGES].min() > EFFECT
    assert effect[2] == 0
    with adapter.disabled():
        assert torch.equal(last_logits(model, batch), before)
    assert torch.equal(last_logits(model, batch), changed)
    unpatch_model(model)
    assert torch.equal(last_logits(model, batch), before)
    assert set(snapshot(model)) == set(left)
    for name, module in model.named_modules():
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        assert not [hook for hook in hooks if hook.__module__.startswith("emma_adapter")]
        assert not [key for key in vars(module) if "emma" in key]
        assert set(vars(module)) <= set(left[name]) | {"_parameters", "_buffers"}


@entries
def test_the_projector_gets_what_it_got_in_the_same_layout(entry):
    """A matrix product may round otherwise for another layout of the same numbers."""
    model = entry.model()
    batch = batch_of(entry, ROWS)
    inner = inner_of(model)
    seen: list[Tensor] = []

    def look(module, args, kwargs):
        seen.append(args[0] if args else next(iter(kwargs.values())))

    def of_call():
        seen.clear()
        # The last of the hooks, as long as it is registered anew.
        handle = find_family(model).projector(inner).register_forward_pre_hook(look, with_kwargs=True)
        last_logits(model, batch)
        handle.remove()
        return list(seen)

    before = of_call()
    patch_model(model, processor=entry.processor())
    after = of_call()
    assert len(before) == len(after) > 0
    for one, other in zip(before, after, strict=True):
        assert one.stride() == other.stride()
        assert torch.equal(one, other)


@each_with_fusions_and_encoders
def test_rows_generate_and_saving(entry, fusion, encoder, clip_folder, tmp_path):
    model, adapter = patched(entry, fusion, encoder, clip_folder)
    train(adapter)
    batch = batch_of(entry, ROWS)
    together = last_logits(model, batch)
    for number, row in enumerate(ROWS):
        alone = last_logits(model, batch_of(entry, (row,)))
        torch.testing.assert_close(together[[number]], alone, atol=SAME, rtol=0)
    torch.testing.assert_close(generated(model, batch), together, atol=SAME, rtol=0)
    adapter.save_pretrained(tmp_path)
    other = entry.model()
    module = WordHashEncoder() if encoder == "custom" else None
    if module is not None:
        module.load_state_dict(adapter._state.pipeline.encoder.module.state_dict())
    load_adapter(other, tmp_path, processor=entry.processor(), instruction_encoder=module)
    assert torch.equal(last_logits(other, batch), together)


# --------------------------------------------------------------------------------------------------------- routing


SIZES = st.tuples(st.sampled_from([28, 56, 84, 112]), st.sampled_from([28, 42, 56, 112]))
WORDS = ("is there a cat?", "how many dogs?", "what colour is the left bird?", "yes, no, two", "describe it in detail")


@st.composite
def batches(draw, entry: Entry) -> list[Row]:
    frames = draw(st.integers(2, 4))  # one number a batch: some families stack their videos
    kinds = [(True, entry.videos)] if entry.mixes_media else [(True, False), (False, True)]
    with_images, with_videos = draw(st.sampled_from(kinds))
    rows = []
    for number in range(draw(st.integers(1, 4))):
        turns = tuple(draw(st.lists(st.sampled_from(WORDS), min_size=1, max_size=3)))
        shown = draw(st.lists(SIZES, max_size=3)) if with_images else ()
        clips = (frames,) * draw(st.integers(0, entry.videos_in_row)) if with_videos else ()
        late = draw(st.booleans())
        rows.append(Row(turns, images=tuple(shown), videos=clips, seed=number, late_images=late))
    return rows


@entries
@settings(max_examples=budget(3, 8))
@given(data=st.data(), padding_side=st.sampled_from(["left", "right"]))
def test_any_batch_treats_each_row_as_if_it_were_alone(entry, data, padding_side):
    rows = data.draw(batches(entry))
    # transformers takes a single visual token of Mistral 3 apart by its channels, without an adapter too.
    assume(entry.name != "mistral3" or ((28, 28),) not in [row.images for row in rows])
    assert_rows_stand_alone(entry, trained(entry)[0], rows, padding_side)


@entries
def test_a_row_does_not_see_the_others(entry):
    model, _ = trained(entry)
    before = last_logits(model, batch_of(entry, ROWS))
    others = [replace(row, turns=("what colour?",), images=row.images[:1], seed=row.seed + 9) for row in ROWS[1:]]
    after = last_logits(model, entry.batch([ROWS[0], *others]))
    torch.testing.assert_close(after[0], before[0], atol=SAME, rtol=0)
    assert (after[[1, 3]] - before[[1, 3]]).abs().amax(dim=1).min() > EFFECT
    backwards = last_logits(model, entry.batch(ROWS[::-1]))
    torch.testing.assert_close(backwards.flip(0), before, atol=SAME, rtol=0)


@entries
def test_an_instruction_moves_the_images_of_its_own_row_only(entry):
    model, _ = trained(entry)
    batch = batch_of(entry, ROWS)
    asked = ["is there a cat?", "how many dogs?", "yes?", "what colour?"]
    before = last_logits(model, batch, instruction=asked)
    for number in range(len(ROWS)):
        other = [*asked[:number], "describe the left bird in detail", *asked[number + 1 :]]
        moved = (last_logits(model, batch, instruction=other) - before).abs().amax(dim=1)
        assert (moved > EFFECT).tolist() == [row == number and row in WITH_IMAGES for row in range(len(ROWS))]


@video_entries
@fusions
def test_images_and_videos_in_one_batch(entry, fusion):
    frames = (3, 3, 3) if entry.stacks_videos else (2, 5, 3)
    rows = (
        Row(("is there a cat?",), images=((56, 56),), videos=frames[:1], seed=1),
        ROWS[2],
        ROWS[1],
        Row(("how many dogs are there?",), videos=frames[1:][: entry.videos_in_row], seed=5),
    )
    model, adapter = patched(entry, fusion)
    batch = batch_of(entry, rows)
    assert {"pixel_values", "pixel_values_videos"} <= set(batch)
    if not entry.mixes_media:
        with pytest.raises(ValueError, match=r"tokens do not match|at the same time") as error:
            entry.model()(**batch)
        pytest.skip(f"transformers itself can't: {error.value}")
    before = last_logits(model, batch)
    train(adapter)
    effect = (last_logits(model, batch) - before).abs().amax(dim=1)
    assert effect[[0, 2, 3]].min() > EFFECT
    assert effect[1] == 0
    assert_rows_stand_alone(entry, model, rows)
    torch.testing.assert_close(generated(model, batch), last_logits(model, batch), atol=SAME, rtol=0)
    # The video, and not only the image, meets the instruction.
    asked = ["yes"] * 4
    told = last_logits(model, batch, instruction=asked)
    other = last_logits(model, batch, instruction=[*asked[:3], "what colour is the left bird?"])
    assert (other[3] - told[3]).abs().max() > EFFECT


@entries
def test_images_that_do_not_fit_the_prompt_are_an_error(entry):
    model, _ = trained(entry)
    one, two = batch_of(entry, ROWS[:1]), batch_of(entry, ROWS[1:2])
    mixed = {**two, **{name: one[name] for name in one if name in ("input_ids", "attention_mask")}}
    mixed = {name: value for name, value in mixed.items() if not name.endswith("token_type_ids")}
    mixed |= {name: one[name] for name in one if name.endswith("token_type_ids")}
    # Where all images take the same number of tokens, and the wrong total can be shared evenly, transformers refuses.
    with pytest.raises(ValueError, match=r"placeholder|tokens do not match") as caught:
        model(**mixed)
    assert isinstance(caught.value, RoutingError) or not entry.dynamic
    with pytest.raises((ValueError, RuntimeError)):
        model.generate(**mixed, max_new_tokens=1)
    with pytest.raises(InstructionError):
        inner_of(model).get_image_features(**feature_arguments(model, one))
    torch.testing.assert_close(generated(model, one), last_logits(model, one), atol=SAME, rtol=0)


# ----------------------------------------------------------------------------------------------------------- calls


MODES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 1},
    "beams": {"num_beams": 3},
    "beams-returned": {"num_beams": 4, "num_return_sequences": 2},
    "samples": {"do_sample": True, "top_k": 1, "num_return_sequences": 2},
    "static": {"do_sample": False, "cache_implementation": "static"},
    "no-cache": {"do_sample": False, "use_cache": False},
}
# One image a row: older transformers mix up the images of a row when they are repeated, without an adapter too.
SINGLE = (ROWS[0], replace(ROWS[1], images=((28, 84),)), replace(ROWS[3], images=((60, 90),)))


@pytest.mark.parametrize(("entry", "mode"), some(3, ZOO.values(), list(MODES)), ids=_name)
def test_generation_modes_keep_rows_apart(entry, mode):
    model, _ = trained(entry)
    mode = MODES[mode]
    rows = ROWS if NEWER_THAN_5_17 or not set(mode) & {"num_beams", "num_return_sequences"} else SINGLE
    batch = batch_of(entry, rows)
    together = model.generate(**batch, max_new_tokens=3, **mode)[:, batch["input_ids"].shape[1] :]
    copies = mode.get("num_return_sequences", 1)
    for number, row in enumerate(rows):
        one = batch_of(entry, (row,))
        alone = model.generate(**one, max_new_tokens=3, **mode)[:, one["input_ids"].shape[1] :]
        assert torch.equal(together[number * copies : (number + 1) * copies], alone)


@entries
def test_beams_are_those_of_an_explicit_instruction(entry):
    """The instruction, not only the tokens, is that of the row: two rows that differ in nothing else."""
    model, _ = trained(entry)
    batch = batch_of(entry, (ROWS[0], ROWS[0]))
    told = ["is there a cat?", "what colour is the left bird?"]
    options = {"num_beams": 2, "max_new_tokens": 2, "output_logits": True, "return_dict_in_generate": True}
    if not NEWER_THAN_5_17:
        plain = entry.model()
        beams = plain.generate(**batch, **options).logits[0]
        if not torch.allclose(beams, last_logits(plain, batch).repeat_interleave(2, dim=0), atol=SAME, rtol=0):
            pytest.skip("transformers itself can't: it repeats patches, and not pictures, for beams")
    logits = model.generate(**batch, instruction=told, **options).logits[0]
    expected = last_logits(model, batch, instruction=told).repeat_interleave(2, dim=0)
    torch.testing.assert_close(logits, expected, atol=SAME, rtol=0)


@entries
def test_decoding_steps_do_no_adapter_work(entry):
    model, adapter = trained(entry)
    batch = batch_of(entry, ROWS[:2])
    calls = len(aligned(model, adapter, lambda: last_logits(model, batch)))
    assert len(aligned(model, adapter, lambda: model.generate(**batch, max_new_tokens=4))) == calls


@pytest.mark.parametrize(("entry", "assistant"), some(1, ZOO.values(), ASSISTANTS), ids=_name)
def test_assisted_generation(entry, assistant):
    """Greedy assisted generation writes what greedy generation writes."""
    model, adapter = trained(entry)
    batch = batch_of(entry, ROWS[:1])
    placeholders = [getattr(model.config, name, None) for name in ("image_token_id", "video_token_id")]
    settings = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [i for i in placeholders if i is not None]}
    assistance = {"prompt_lookup_num_tokens": 2} if assistant == "lookup" else {"assistant_model": entry.model(seed=3)}
    if assistant == "patched model":
        train(patch_model(assistance["assistant_model"], processor=entry.processor()))
    expected = model.generate(**batch, **settings)
    with adapter.disabled():
        other = model.generate(**batch, **settings)
    try:
        plain = entry.model().generate(**batch, **settings, **assistance)
        written = model.generate(**batch, **settings, **assistance)
    except ValueError as error:
        # A lookup may propose a placeholder of the prompt, which transformers takes for a missing image.
        missing_image = assistant == "lookup" and "tokens do not match" in str(error)
        if not missing_image and "not supported with stateful models" not in str(error):
            raise
        pytest.skip(f"transformers itself can't: {error}")
    assert torch.equal(plain, other) or assistant == "patched model"
    assert torch.equal(written, expected)


@pytest.mark.skipif(not NEWER_THAN_5_17, reason="transformers < 5.18 can't prefill images in chunks")
@entries
def test_chunked_prefill(entry):
    model, _ = trained(entry)
    batch = batch_of(entry, ROWS[:1])
    plain = entry.model()
    try:
        chunked = generated(plain, batch, prefill_chunk_size=5)
    except Exception as error:  # noqa: BLE001 - whatever this release of transformers raises for this family
        pytest.skip(f"transformers itself can't: {type(error).__name__}: {error}")
    if not torch.allclose(chunked, generated(plain, batch), atol=SAME, rtol=0):
        pytest.skip("a prefix that attends in both directions can't be cut in chunks")
    torch.testing.assert_close(
        generated(model, batch, prefill_chunk_size=5), last_logits(model, batch), atol=SAME, rtol=0
    )


@pytest.mark.parametrize(("entry", "new_ids_only"), some(1, ZOO.values(), [False, True]), ids=_name)
@pytest.mark.parametrize("cache_name", ["past_key_values", "cache"])
def test_a_continued_chat_with_a_cache_and_a_new_image(entry, cache_name, new_ids_only):
    model, adapter = trained(entry)
    first = batch_of(entry, (replace(ROWS[0], images=((56, 56),)),))
    second = batch_of(entry, (Row(("what colour is the left bird?",), images=((84, 56),), seed=8),))
    plain = entry.model()

    def chat(chatting: nn.Module) -> Tensor:
        settings = {"max_new_tokens": 2, "do_sample": False, "return_dict_in_generate": True}
        begun = chatting.generate(**first, **settings)
        ids = torch.cat([begun.sequences, second["input_ids"]], dim=1)
        inputs = {**second, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for name in second:
            if name.endswith("token_type_ids"):
                written = begun.sequences.shape[1] - first[name].shape[1]
                inputs[name] = torch.cat([first[name], first[name].new_zeros(1, written), second[name]], dim=1)
        cache = begun.past_key_values
        if new_ids_only:
            inputs["input_ids"] = ids[:, cache.get_seq_length() :]
        return chatting.generate(**inputs, **{cache_name: cache}, **settings).sequences

    try:
        chat(plain)
    except Exception as error:  # noqa: BLE001 - whatever this release of transformers raises for this family
        pytest.skip(f"transformers itself can't: {type(error).__name__}: {error}")
    in_chat = aligned(model, adapter, lambda: chat(model))
    alone = aligned(model, adapter, lambda: [last_logits(model, first), last_logits(model, second)])
    assert len(in_chat) == len(alone)
    if adapter._state.pipeline.reader.markers is not None:
        # With a chat template the last turn alone is the instruction, whatever stands before it.
        for one, other in zip(in_chat, alone, strict=True):
            torch.testing.assert_close(one, other, atol=SAME, rtol=0)


@entries
def test_a_continued_chat_through_forward(entry):
    """The call's ids are only what the cache doesn't hold; its attention mask is longer than they are."""
    model, adapter = trained(entry)
    first = batch_of(entry, (replace(ROWS[0], images=((56, 56),)),))
    second = batch_of(entry, (Row(("what colour is the left bird?",), images=((84, 56),), seed=8),))
    whole = torch.cat([first["attention_mask"], second["attention_mask"]], dim=1)
    if entry.reads_ids:
        whole = None  # of which those would be made, one for each id

    def chat() -> None:
        cache = model(**first, use_cache=True).past_key_values
        model(**{**second, "attention_mask": whole}, past_key_values=cache)

    with torch.no_grad():
        in_chat = aligned(model, adapter, chat)
    alone = aligned(model, adapter, lambda: [last_logits(model, first), last_logits(model, second)])
    for one, other in zip(in_chat, alone, strict=True):
        torch.testing.assert_close(one, other, atol=SAME, rtol=0)


@entries
def test_inputs_embeds_with_an_explicit_instruction(entry):
    model, _ = trained(entry)
    batch = dict(batch_of(entry, ROWS))
    told = ["is there a cat?", "how many dogs?", "yes?", "what colour?"]
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach()
    embedded = {name: value for name, value in batch.items() if name != "input_ids"} | {"inputs_embeds": embeds}
    try:
        expected = last_logits(entry.model(), embedded)
    except Exception as error:  # noqa: BLE001 - whatever this release of transformers raises for this family
        pytest.skip(f"transformers itself can't: {type(error).__name__}: {error}")
    assert torch.isfinite(expected).all()
    model_out = last_logits(model, embedded, instruction=told)
    if not entry.reads_ids:
        torch.testing.assert_close(model_out, last_logits(model, batch, instruction=told), atol=SAME, rtol=0)
    assert (model_out - expected)[WITH_IMAGES].abs().amax(dim=1).min() > EFFECT
    with pytest.raises(InstructionError, match="instruction="):
        model(**embedded)


@pytest.mark.skipif(not NEWER_THAN_5_17, reason="mm_encoder_outputs came with transformers 5.18")
@entries
def test_precomputed_features(entry):
    model, adapter = trained(entry)
    batch = batch_of(entry, ROWS[:1])
    told = "is there a cat?"
    with torch.no_grad(), adapter.instruction(told):
        features = inner_of(model).get_image_features(**feature_arguments(model, batch), return_dict=True)
    rest = {name: value for name, value in batch.items() if not name.startswith("pixel")}
    calls = aligned(model, adapter, lambda: last_logits(model, rest, mm_encoder_outputs={"image": features}))
    assert not calls
    expected = last_logits(model, batch, instruction=[told])
    got = last_logits(model, rest, mm_encoder_outputs={"image": features})
    torch.testing.assert_close(got, expected, atol=SAME, rtol=0)


@entries
def test_features_with_one_instruction_for_each_image(entry):
    model, adapter = trained(entry)
    batch = batch_of(entry, (replace(ROWS[3], images=((84, 28), (60, 90))),))
    method, pixels = inner_of(model).get_image_features, feature_arguments(model, batch)
    with torch.no_grad(), adapter.instruction("is there a cat?"):
        same = aligned(model, adapter, lambda: method(**pixels))
    assert same
    if entry.name == "lfm2_vl" and len(same) > 1:
        pytest.skip("this transformers projects one image in a call, so that none tells how many there are")
    with torch.no_grad(), adapter.instruction(["is there a cat?"] * 40), pytest.raises(InstructionError, match="40"):
        method(**pixels)


@entries
def test_the_inner_model_called_directly(entry):
    model, _ = trained(entry)
    inner = inner_of(model)
    if inner is model:
        pytest.skip("there is no model inside the one with the language-model head")
    batch = batch_of(entry, ROWS)
    seen: list[Tensor] = []
    handle = inner.register_forward_hook(lambda module, args, output: seen.append(output.last_hidden_state))
    with torch.no_grad():
        model(**batch)
        handle.remove()
        hidden = inner(**batch).last_hidden_state
        told = inner(**batch, instruction=["is there a cat?"] * 4).last_hidden_state
    torch.testing.assert_close(hidden, seen[0], atol=SAME, rtol=0)
    assert (told - hidden)[WITH_IMAGES].abs().amax() > EFFECT


@entries
def test_pipelines_ask_the_question_of_their_chat(entry):
    """``pipeline("image-text-to-text")`` takes pictures and a chat, and calls processor and ``generate`` itself."""
    model, adapter = trained(entry)
    row = ROWS[0]
    talk = row.messages()
    for part in talk[-1]["content"]:
        if part["type"] == "image":
            part["image"] = row.pictures()[0]

    def ask(asked: nn.Module) -> list[dict[str, Any]]:
        pipe = transformers.pipeline("image-text-to-text", model=asked, processor=entry.processor())
        return pipe(text=talk, max_new_tokens=2, generate_kwargs={"do_sample": False})

    try:
        ask(entry.model())
    except Exception as error:  # noqa: BLE001 - whatever this release of transformers raises for this family
        pytest.skip(f"transformers itself can't: {type(error).__name__}: {error}")
    piped = aligned(model, adapter, lambda: ask(model))
    direct = aligned(model, adapter, lambda: last_logits(model, batch_of(entry, (row,))))
    assert len(piped) == len(direct) > 0
    for one, other in zip(piped, direct, strict=True):
        torch.testing.assert_close(one, other, atol=SAME, rtol=0)


@entries
def test_a_call_never_uses_the_instruction_of_another(entry):
    model, _ = trained(entry)
    batch = batch_of(entry, ROWS)
    expected = last_logits(model, batch)
    for _ in range(2):
        last_logits(model, batch, instruction=["what colour is the left bird?"] * 4)
        model.generate(**batch, instruction=["what colour is the left bird?"] * 4, max_new_tokens=1)
        assert torch.equal(last_logits(model, batch), expected)
    with pytest.raises(InstructionError, match=r"adapter\.instruction"):
        inner_of(model).get_image_features(**feature_arguments(model, batch))


@pytest.mark.parametrize("told", [None, ["is there a cat?"]])
def test_a_call_inside_of_generate_has_its_own_instruction(told):
    """As a logits processor may make one, with other images, and fewer rows than ``generate`` has."""
    entry = ZOO["llava"]
    model, _ = trained(entry)
    other = batch_of(entry, ROWS[1:2])
    more = {} if told is None else {"instruction": told}
    expected, seen = last_logits(model, other, **more), []

    class Curious(transformers.LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            seen.append(last_logits(model, other, **more))
            return scores

    for rows in (ROWS[:1], ROWS[:2]):
        batch = batch_of(entry, rows)
        before = generated(model, batch)
        after = generated(model, batch, logits_processor=[Curious()])
        assert torch.equal(before, after)
    assert len(seen) == 2
    for logits in seen:
        torch.testing.assert_close(logits, expected, atol=SAME, rtol=0)


@entries
def test_training_after_inference_mode(entry):
    """What is kept from one call to the next must not be made of tensors that can't be trained with."""
    model, adapter = patched(entry)
    train(adapter)
    rows = (Row(("how many dogs are there?",), images=((84, 112),), seed=1),)
    with torch.inference_mode():
        model(**batch_of(entry, rows))
    model.train()
    model(**answered(entry, rows, "a red bird.")).loss.backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())


@entries
def test_a_number_of_visual_tokens_that_is_right_is_right(entry):
    model, adapter = patched(entry)
    number, grid = adapter.config.num_visual_tokens, adapter.config.visual_grid
    family = find_family(model)
    is_fixed = family.has_fixed_size(family.inner(model))
    model, adapter = patched(entry, num_visual_tokens=number, visual_grid=None if is_fixed else grid)
    assert adapter.config.visual_grid == grid
    last_logits(model, batch_of(entry, ROWS))


# -------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize(("entry", "policy"), some(1, ZOO.values(), POLICIES), ids=_name)
def test_answers_never_reach_the_visual_tokens(entry, policy):
    model, adapter = patched(entry, instruction_policy=policy)
    train(adapter)
    model.train()
    one, other = (answered(entry, ROWS, answer) for answer in ("a red bird.", "two dogs, and a tree on the left?"))
    assert one["input_ids"].shape != other["input_ids"].shape
    first, second = (aligned(model, adapter, lambda batch=batch: model(**batch)) for batch in (one, other))
    assert first
    for before, after in zip(first, second, strict=True):
        assert torch.equal(before, after)
    model.eval()
    prompt = aligned(model, adapter, lambda: last_logits(model, batch_of(entry, ROWS)))
    for before, after in zip(first, prompt, strict=True):
        torch.testing.assert_close(before, after, atol=SAME, rtol=0)


@entries
@fusions
def test_gradients_reach_every_parameter_of_the_adapter(entry, fusion):
    model, adapter = patched(entry, fusion)
    adapter.train_only()
    model.train()
    train(adapter)
    model(**answered(entry, ROWS, "a red bird.")).loss.backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())
    assert all(parameter.grad.abs().max() > 0 for parameter in adapter.parameters())
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == {
        name for name, _ in model.named_parameters() if ".emma." in name
    }
