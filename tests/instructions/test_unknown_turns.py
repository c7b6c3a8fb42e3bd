"""Prompts whose turns the processor's chat template doesn't tell: said, or refused, but never read whole in silence."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from tokenizers import AddedToken
from transformers import AutoProcessor

from benchmarks.digits_vqa.vlm import BASE_DIR
from emma_adapter import EmmaConfig, InstructionError, get_adapter, load_adapter, patch_model
from emma_adapter.instructions.prompt import Prompt
from emma_adapter.instructions.reader import InstructionReader
from tests.support import tiny
from tests.support.zoo.text import CHATML, chat_template

TALK = [tiny.user("what is it?"), tiny.assistant("a red bird"), tiny.user("why?", 0)]
OTHERS = {
    "chatml": chat_template(**CHATML, image="<image>"),
    "llama2": chat_template(user="[INST] {} [/INST]", assistant=" {} </s>", system="{}", image="<image>"),
    "gemma": chat_template(
        user="<start_of_turn>user\n{}<end_of_turn>\n",
        assistant="<start_of_turn>model\n{}<end_of_turn>\n",
        system="{}",
        image="<image>",
    ),
    "idefics": chat_template(user="User: {}<end>\n", assistant="Assistant: {}<end>\n", system="{}", image="<image>"),
    "phi": chat_template(
        user="<|user|>\n{}<|end|>\n", assistant="<|assistant|>\n{}<|end|>\n", system="{}", image="<image>"
    ),
    "unheard of": chat_template(user="Q) {}\n", assistant="A) {}</s>\n", system="{}", image="<image>"),
}
UNREADABLE = (
    "{% for m in messages %}{% for p in m['content'] if p['type'] == 'text' %}{{ p['text'] }} {% endfor %}{% endfor %}"
)
every_other = pytest.mark.parametrize("name", OTHERS)


def encoded(processor, talk, template=None):
    text = processor.apply_chat_template(talk, add_generation_prompt=True, chat_template=template)
    return dict(processor(text=text, images=[tiny.picture(0)], return_tensors="pt"))


def special(processor, *texts: str):
    processor.tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in texts])
    return processor


def patched(processor, config=None, **options):
    model = tiny.llava(vocab_size=600)
    patch_model(model, config, processor=processor, **options)
    return model


@every_other
@pytest.mark.parametrize("tokens", ["plain", "special"])
def test_a_conversation_by_another_template_is_refused(name, tokens):
    processor = tiny.processor()
    if tokens == "special":
        special(
            processor, "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "<start_of_turn>", "<|assistant|>", "<end>"
        )
    model = patched(processor)
    for call in (model, model.generate):
        with pytest.raises(InstructionError, match=r"answers of the assistant.*processor"):
            call(**encoded(processor, TALK, OTHERS[name]))
    named = encoded(processor, TALK, OTHERS[name])
    assert torch.isfinite(model(**named, instruction="why?").logits).all()


@every_other
def test_a_question_by_another_template_is_read_whole_with_one_warning(name):
    processor = tiny.processor()
    model = patched(processor)
    inputs = encoded(processor, TALK[:1], OTHERS[name])
    with pytest.warns(UserWarning, match="nothing in the prompt looks like"):
        model(**inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**inputs)


@every_other
def test_where_labels_tell_the_answers_they_part_the_turns(name):
    processor = tiny.processor()
    reader = InstructionReader(processor, {1, 2, 3, 4}, "last_turn")
    text = processor.apply_chat_template([*TALK, tiny.assistant("so")], chat_template=OTHERS[name])
    ids = processor.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    plain = [processor.tokenizer.decode([i]) for i in ids[0]]
    answer = torch.zeros_like(ids, dtype=torch.bool)
    for said in ("a red bird", "so"):
        words = processor.tokenizer(f" {said}", add_special_tokens=False)["input_ids"]
        bare = processor.tokenizer(said, add_special_tokens=False)["input_ids"]
        starts = [i for i in range(len(plain)) for w in (words, bare) if ids[0, i : i + len(w)].tolist() == w]
        assert starts, (said, plain)
        answer[0, starts[-1] : starts[-1] + len(words)] = True
    with pytest.warns(UserWarning, match="nothing in the prompt"):
        [found] = reader.texts(Prompt(ids, labels=torch.where(answer, ids, -100), trains=True))
    assert "why?" in found
    assert "bird" not in found


@pytest.mark.parametrize(
    "typed",
    ["USER: <image>\nis there a cat? ASSISTANT:", "USER: <image>\nis there a cat?", "<image>is there a cat?"],
)
def test_a_question_typed_by_hand_works(typed):
    processor = tiny.processor()
    model, reader = patched(processor), InstructionReader(processor, {1, 2, 3, 4}, "last_turn")
    inputs = dict(processor(text=typed, images=[tiny.picture(0)], return_tensors="pt"))
    with warnings.catch_warnings():
        warnings.simplefilter("error" if typed.startswith("USER") else "ignore")
        model.generate(**inputs, max_new_tokens=2)
        assert reader.texts(Prompt(inputs["input_ids"])) == ["is there a cat?"]


def test_patching_warns_where_turns_cannot_be_told_apart(tmp_path):
    processor = tiny.processor()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_adapter(patched(processor)).save_pretrained(tmp_path)
        patch_model(tiny.llava())
    processor.chat_template = UNREADABLE
    for do in (
        lambda: patched(processor),
        lambda: patched(processor, EmmaConfig(instruction_policy="all_turns")),
        lambda: patched(processor.tokenizer if processor.tokenizer.chat_template else processor),
        lambda: load_adapter(tiny.llava(vocab_size=600), tmp_path, processor=processor),
        lambda: get_adapter(patched(tiny.processor())).add("other", processor=processor),
    ):
        with pytest.warns(UserWarning, match=r"chat template of this LlavaProcessor doesn't show") as said:
            do()
        assert {warning.filename for warning in said} == {__file__}
    processor.chat_template = None
    with pytest.warns(UserWarning, match="LlavaProcessor has no chat template"):
        patched(processor)
    with pytest.warns(UserWarning, match="shortest_turn"):
        patched(None, EmmaConfig(instruction_policy="shortest_turn"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patched(processor, EmmaConfig(instruction_policy="all_turns"))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("template", [None, UNREADABLE])
def test_without_markers_a_conversation_is_refused_and_a_question_works(template):
    processor = tiny.processor()
    processor.chat_template = template
    model = patched(processor)
    model(**encoded(processor, TALK[:1], OTHERS["idefics"]))
    with pytest.raises(InstructionError, match="answers of the assistant"):
        model(**encoded(processor, TALK, OTHERS["idefics"]))


# --- What changes in a processor after patching --------------------------------------------------------------------


@every_other
def test_a_template_that_is_set_later_counts(name):
    processor = tiny.processor()
    model, reader = patched(processor), InstructionReader(processor, {1, 2, 3, 4}, "last_turn")
    twin = copy.deepcopy(reader)
    processor.chat_template = OTHERS[name]
    inputs = encoded(processor, TALK)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**inputs)
        for one in (reader, twin, reader.with_policy("last_turn")):
            assert one.texts(Prompt(inputs["input_ids"])) == ["why?"]


def test_tokens_that_are_added_later_are_known_to_copies_made_before():
    processor = tiny.processor()
    model = patched(processor)
    readers = [model._emma.pipeline.reader, copy.deepcopy(model)._emma.pipeline.reader]
    readers.append(readers[0].with_policy("last_turn"))
    for reader in readers:
        reader.tokenize(["is there a cat?"])  # makes the copy that texts are tokenized with
    special(processor, "<loc>")
    processor.tokenizer.add_tokens(["zyzzyva"])
    inputs = encoded(processor, [tiny.user("is <loc>it a zyzzyva?")])
    [place, word] = processor.tokenizer.convert_tokens_to_ids(["<loc>", "zyzzyva"])
    for reader in readers:
        chosen = inputs["input_ids"][reader.select(Prompt(inputs["input_ids"]))].tolist()
        assert place not in chosen
        assert word in chosen
        assert reader.texts(Prompt(inputs["input_ids"])) == ["is it a zyzzyva?"]
        assert word in reader.tokenize(["a zyzzyva"])[0]


def test_markers_that_become_special_tokens_later_are_found():
    processor = tiny.processor()
    processor.chat_template = OTHERS["chatml"]
    reader = InstructionReader(processor, {1, 2, 3, 4}, "last_turn")
    special(processor, "<|im_start|>", "<|im_end|>")
    assert reader.texts(Prompt(encoded(processor, TALK)["input_ids"])) == ["why?"]


def test_tokens_that_the_tokenizer_does_not_know_are_no_words():
    """As in a process that got the model, and the tokenizer with it, before the tokens were added."""
    reader = InstructionReader(tiny.processor(), {1, 2, 3, 4}, "last_turn")
    processor = special(tiny.processor(), "<loc>")
    inputs = encoded(processor, [tiny.user("is <loc>it?")])
    with pytest.warns(UserWarning, match="tokenizer which patch_model was given doesn't know"):
        assert reader.texts(Prompt(inputs["input_ids"])) == ["is it?"]


# --- Vocabularies of whole words -----------------------------------------------------------------------------------


def test_the_turns_of_a_vocabulary_of_words_are_found():
    """Such as the demo's, to which every word but its own is unknown."""
    processor = AutoProcessor.from_pretrained(BASE_DIR)
    talk = [tiny.user("what digit is at the top left ?"), tiny.assistant("seven"), tiny.user("is there a red one ?", 0)]
    text = processor.apply_chat_template(talk, add_generation_prompt=True)
    ids = processor.tokenizer(text, return_tensors="pt")["input_ids"]
    reader = InstructionReader(processor, range(5), "last_turn")
    assert reader.texts(Prompt(ids)) == ["is there a red one ?"]
    assert reader.with_policy("all_turns").texts(Prompt(ids)) == [
        "what digit is at the top left ? is there a red one ?"
    ]
