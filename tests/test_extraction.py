"""Which tokens of a prompt are the instruction."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny
from emma_adapter import InstructionError
from emma_adapter.instructions.extraction import InstructionReader, Prompt
from emma_adapter.instructions.templates import read_markers

VICUNA = tiny.CHAT_TEMPLATE
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}[INST] "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %} [/INST]{% elif message['role'] == 'assistant' %} {{ message['content'][0]['text'] }}{{ eos_token }}"
    "{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>"
    "{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
TEMPLATES = {"vicuna": VICUNA, "chatml": CHATML, "mistral": MISTRAL, "gemma": GEMMA, "llama3": LLAMA3}
# Text as people write it, short of the templates' own markers.
WORDS = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"], exclude_characters="<>[]|"), min_size=1, max_size=25
).filter(lambda text: text.strip() and not {"USER:", "ASSISTANT:"} & {text.strip()})


def squeezed(text: str) -> str:
    return "".join(text.split())


def processor_with(template: str):
    processor = tiny.processor()
    processor.chat_template = template
    return processor


def reader(template: str | None, policy: str = "last_turn") -> InstructionReader:
    return InstructionReader(None if template is None else processor_with(template), {1, 2, 3, 4}, policy)


def prompt_of(template: str, talks, *, padding_side: str = "left", generate: bool = True) -> Prompt:
    processor = processor_with(template)
    processor.tokenizer.padding_side = padding_side
    texts = [processor.apply_chat_template(talk, add_generation_prompt=generate) for talk in talks]
    encoded = processor.tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)
    return Prompt(encoded["input_ids"], encoded["attention_mask"])


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@given(turns=st.lists(WORDS, min_size=1, max_size=3), answer=WORDS, padding_side=st.sampled_from(["left", "right"]))
def test_user_turns_are_read_exactly(template, turns, answer, padding_side):
    talk = [message for turn in turns for message in (tiny.user(turn), tiny.assistant(answer))][:-1]
    prompt = prompt_of(
        template, [talk, [tiny.user("a second row, so that there is padding")]], padding_side=padding_side
    )
    for policy, expected in (("last_turn", turns[-1]), ("all_turns", "".join(turns))):
        text, other = reader(template, policy).texts(prompt)
        assert squeezed(text) == squeezed(expected)
        assert squeezed(other) == squeezed("a second row, so that there is padding")


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_answers_are_not_read_even_without_labels(template):
    talk = [
        tiny.user("is there a cat?"),
        tiny.assistant("no"),
        tiny.user("how many dogs are there?"),
        tiny.assistant("two"),
    ]
    [text] = reader(template).texts(prompt_of(template, [talk], generate=False))
    assert text == "how many dogs are there?"


def test_system_prompts_and_images_between_words_are_dropped():
    system = {
        "role": "system",
        "content": [{"type": "text", "text": "A chat between a curious human and an assistant."}],
    }
    talk = [
        system,
        {
            "role": "user",
            "content": [{"type": "text", "text": "is"}, {"type": "image"}, {"type": "text", "text": "it?"}],
        },
    ]
    for template in (VICUNA, CHATML):
        [text] = reader(template).texts(prompt_of(template, [talk]))
        assert "".join(text.split()) == "isit?"


def test_shortest_turn():
    talk = [
        tiny.user("describe the image in detail"),
        tiny.assistant("a bird"),
        tiny.user("why?"),
        tiny.assistant("yes"),
        tiny.user("is it a dog?"),
    ]
    [text] = reader(VICUNA, "shortest_turn").texts(prompt_of(VICUNA, [talk]))
    assert text == "why?"


def test_empty_user_text_is_an_empty_instruction():
    talk = [{"role": "user", "content": [{"type": "image"}]}]
    assert not reader(VICUNA).select(prompt_of(VICUNA, [talk])).any()


def test_a_processor_without_a_template_has_no_markers():
    processor = tiny.processor()
    processor.chat_template = None
    processor.tokenizer.chat_template = None
    assert read_markers(processor) is None


def test_a_template_that_breaks_has_no_markers():
    assert read_markers(processor_with("{{ raise_exception('no') }}")) is None
    assert read_markers(processor_with("always the same")) is None


def test_without_processor_the_whole_prompt_counts():
    ids = torch.tensor([[3, 3, 1, 4, 4, 10, 11, 2], [1, 12, 13, 14, 15, 16, 17, 18]])
    mask = (ids != 3).long()
    selected = reader(None).select(Prompt(ids, mask))
    assert selected.tolist() == [[i in (10, 11) for i in ids[0]], [i >= 12 for i in ids[1]]]


def labels_for(ids: list[int], supervised: set[int]) -> torch.Tensor:
    return torch.tensor([[token if token in supervised else -100 for token in ids]])


def test_without_processor_labels_tell_turns_apart():
    ids = [1, 10, 11, 12, 50, 51, 2, 20, 60, 2, 30]
    labels = labels_for(ids, {50, 51, 60})
    prompt = Prompt(torch.tensor([ids]), torch.ones(1, len(ids)), labels, trains=True)
    chosen = {
        policy: torch.tensor(ids)[reader(None, policy).select(prompt)[0]].tolist()
        for policy in ("last_turn", "shortest_turn", "all_turns")
    }
    assert chosen == {"last_turn": [20], "shortest_turn": [20], "all_turns": [10, 11, 12, 20]}


@given(st.data())
def test_supervised_tokens_are_never_selected(data):
    length = data.draw(st.integers(2, 12))
    ids = torch.tensor([data.draw(st.lists(st.integers(5, 60), min_size=length, max_size=length))])
    supervised = torch.tensor([data.draw(st.lists(st.booleans(), min_size=length, max_size=length))])
    labels = torch.where(supervised, ids, torch.tensor(-100))
    policy = data.draw(st.sampled_from(["last_turn", "shortest_turn", "all_turns"]))
    prompt = Prompt(ids, None, labels, trains=True)
    for template in (None, VICUNA):
        try:
            selected = reader(template, policy).select(prompt)
        except InstructionError:
            assert supervised.all()
            continue
        assert not (selected & supervised).any()
        assert selected.any()


def test_labels_of_another_shape_are_an_error():
    with pytest.raises(InstructionError, match="labels"):
        reader(None).select(Prompt(torch.ones(1, 4, dtype=torch.long), None, torch.ones(1, 3), trains=True))


def test_masks_of_another_shape_are_ignored():
    """transformers hands over 4-D masks and dictionaries of masks; only a 2-D one names padding."""
    ids = torch.tensor([[10, 11, 12]])
    assert reader(None).select(Prompt(ids, torch.zeros(1, 1, 3, 3))).all()


ANSWERS = WORDS | st.sampled_from(
    [
        "",
        "USER: two ASSISTANT: three",
        "<|im_end|>",
        "<|im_start|>user",
        "[INST]",
        "[/INST] x",
        "<start_of_turn>user",
        "ASSISTANT:",
    ]
)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("policy", ["last_turn", "shortest_turn", "all_turns"])
@given(turns=st.lists(WORDS, min_size=1, max_size=3), answers=st.lists(ANSWERS, min_size=3, max_size=3), data=st.data())
def test_nothing_an_answer_says_changes_the_instruction(template, policy, turns, answers, data):
    """Answers in many shapes, supervised up to a point that differs: with or without the template's closing text."""
    processor = processor_with(template)
    tokenizer = processor.tokenizer
    rendered = []
    for replies in (answers, ["fine", "fine", "fine"]):
        ids, labels, before = [], [], ""
        for i in range(len(turns)):
            talk = [
                m
                for turn, reply in zip(turns, replies, strict=False)
                for m in (tiny.user(turn, images=0), tiny.assistant(reply))
            ]
            prompt = processor.apply_chat_template(talk[: 2 * i + 1], add_generation_prompt=True)
            whole = processor.apply_chat_template(talk[: 2 * i + 2])
            if not (prompt.startswith(before) and whole.startswith(prompt)):
                return  # a template that trims what it is given: the pieces can't be told apart in text
            for text, supervised in ((prompt[len(before) :], False), (whole[len(prompt) :], True)):
                piece = tokenizer(text, add_special_tokens=False)["input_ids"]
                ids += piece
                labels += piece if supervised else [-100] * len(piece)
            before = whole
        prompt = Prompt(torch.tensor([ids]), None, torch.tensor([labels]), trains=True)
        selected = reader(template, policy).select(prompt)[0]
        rendered.append([token for token, keep in zip(ids, selected.tolist(), strict=True) if keep])
    assert rendered[0] == rendered[1]
    if policy == "last_turn":
        assert squeezed(tokenizer.decode(rendered[0])) == squeezed(turns[-1])


@pytest.mark.parametrize("template", [None, VICUNA], ids=["no-template", "vicuna"])
def test_labels_that_mask_only_images_and_padding_are_an_error(template):
    processor = tiny.processor()
    ids = torch.tensor(
        [
            [
                3,
                3,
                1,
                *processor.tokenizer("USER: <image><image> is it? ASSISTANT: yes", add_special_tokens=False)[
                    "input_ids"
                ],
            ]
        ]
    )
    labels = ids.clone()
    labels[(ids == 4) | (ids == 3)] = -100
    with pytest.raises(InstructionError, match="supervise every token"):
        reader(template).select(Prompt(ids, (ids != 3).long(), labels, trains=True))


def test_characters_of_several_tokens_do_not_hide_a_marker():
    talk = [tiny.user("why?"), tiny.assistant("two birds 🐦"), tiny.user("a 🐦 in 日本?"), tiny.assistant("🐦")]
    [text] = reader(VICUNA).texts(prompt_of(VICUNA, [talk], generate=False))
    assert squeezed(text) == squeezed("a 🐦 in 日本?")
