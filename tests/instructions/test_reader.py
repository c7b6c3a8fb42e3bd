"""Which tokens of a prompt are the instruction."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from emma_adapter import InstructionError
from emma_adapter.instructions.decoding import TokenTexts
from emma_adapter.instructions.prompt import Prompt
from emma_adapter.instructions.reader import InstructionReader
from emma_adapter.instructions.templates import read_markers
from tests.support import tiny
from tests.support.budget import budget, some
from tests.support.zoo import ZOO

# --- Chat templates in the formats of well-known models -----------------------------------------------------------

SYSTEM_APART = (
    "{% set talk = messages %}{% if messages[0]['role'] == 'system' %}{% set talk = messages[1:] %}{% set system = "
    "messages[0]['content'] if messages[0]['content'] is string else messages[0]['content'][0]['text'] %}{% endif %}"
)
ALTERNATING = (
    "{% for m in talk %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}{% endfor %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"


def said(image: str = "<image>", video: str = "", text: str = "p['text']") -> str:
    return (
        "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] %}"
        "{% if p['type'] == 'image' %}" + image + "{% elif p['type'] == 'video' %}" + video + "{% else %}"
        "{{ " + text + " }}{% endif %}{% endfor %}{% endif %}"
    )


def chatml(image: str, video: str = "", *, default: str = "", user_header: str = "{{ m['role'] }}") -> str:
    first = "{% if loop.first and m['role'] != 'system' %}<|im_start|>system\n" + default + "<|im_end|>\n{% endif %}"
    return (
        "{% for m in messages %}" + (first if default else "") + "<|im_start|>" + user_header + "\n"
        + said(image, video) + "<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )  # fmt: skip


def mistral(merged_into: str) -> str:
    return (
        SYSTEM_APART + ALTERNATING + "{{ bos_token }}{% for m in talk %}{% if m['role'] == 'user' %}[INST] "
        "{% if " + merged_into + " and system %}{{ system }}\n\n{% endif %}" + said("[IMG]") + " [/INST]"
        "{% else %} " + said() + "{{ eos_token }}{% endif %}{% endfor %}"
    )  # fmt: skip


QWEN_IMAGE, QWEN_VIDEO = (f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video"))


@dataclass(frozen=True)
class Style:
    """``special`` are the tokens the family registers; the placeholder always is one. ``system`` is what becomes of a
    system message: it stands ``apart``, ``tagged`` or ``joined`` by white space in a user turn, or is ``refused``."""

    template: str
    special: tuple[str, ...] = ()
    image: str = "<image>"
    system: str = "apart"
    tools: bool = False
    markers: tuple[str, ...] = ()  # plain text in any case


STYLES = {
    "vicuna": Style(
        SYSTEM_APART + "{{ system or 'A chat between a curious user and an assistant.' }} {% for m in talk %}"
        "{% if m['role'] == 'user' %}USER: " + said("<image>\n") + " {% else %}ASSISTANT: " + said() + "{{ eos_token }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}",
        markers=("USER:", "ASSISTANT:"),
    ),
    # As llava-hf publishes them for LLaVA-1.5, and for LLaVA-1.6 with Mistral.
    "llava-1.5": Style(tiny.CHAT_TEMPLATE, markers=("USER:", "ASSISTANT:")),
    "llava-1.6": Style(
        ZOO["llava_next"].processor().chat_template,
        system="tagged",
        markers=("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"),
    ),
    "llama2": Style(
        SYSTEM_APART + ALTERNATING + "{% for m in talk %}{% if m['role'] == 'user' %}{{ bos_token }}[INST] "
        "{% if loop.first and system %}<<SYS>>\n{{ system }}\n<</SYS>>\n\n{% endif %}" + said("<image>\n") + " [/INST]"
        "{% else %} " + said() + " {{ eos_token }}{% endif %}{% endfor %}",
        system="tagged",
        markers=("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"),
    ),
    "llama2-default-system": Style(
        ALTERNATING.replace("talk", "messages") + "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token }}"
        "[INST] {% if loop.first %}<<SYS>>\nYou are honest.\n<</SYS>>\n\n{% endif %}" + said("<image>\n") + " [/INST]"
        "{% else %} " + said() + " {{ eos_token }}{% endif %}{% endfor %}",
        system="refused",
        markers=("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"),
    ),
    "mistral-first": Style(mistral("loop.first"), ("[INST]", "[/INST]"), "[IMG]", "joined"),
    "mistral-last": Style(mistral("loop.last"), ("[INST]", "[/INST]"), "[IMG]", "joined"),
    "mistral-tools": Style(
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}[SYSTEM_PROMPT]"
        + said()
        + "[/SYSTEM_PROMPT]{% elif m['role'] == 'user' %}{% if tools and loop.last %}[AVAILABLE_TOOLS]"
        "{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}[INST]" + said("[IMG]") + "[/INST]"
        "{% elif m['role'] == 'tool' %}{% if m['tool_call_id'] | length != 9 %}{{ raise_exception('9!') }}{% endif %}"
        '[TOOL_RESULTS]{"content": "' + said() + '", "call_id": "{{ m[\'tool_call_id\'] }}"}[/TOOL_RESULTS]'
        "{% elif m['tool_calls'] %}[TOOL_CALLS]{{ m['tool_calls'] | tojson }}{{ eos_token }}"
        "{% else %}" + said() + "{{ eos_token }}{% endif %}{% endfor %}",
        (
            *("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
            *("[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        ),
        "[IMG]",
        tools=True,
    ),
    "llama3": Style(
        SYSTEM_APART + "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: 2023\n\n"
        "{{ system }}{% if tools %}{{ tools | tojson(indent=4) }}{% endif %}<|eot_id|>{% for m in talk %}"
        "<|start_header_id|>{{ 'ipython' if m['role'] == 'tool' else m['role'] }}<|end_header_id|>\n\n"
        "{% if m['tool_calls'] %}{{ m['tool_calls'] | tojson }}{% else %}" + said("<|image|>") + "{% endif %}<|eot_id|>"
        "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|image|>",
        tools=True,
    ),
    "llama3-tools-in-user-turn": Style(
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>"
        "{{ 'ipython' if m['role'] == 'tool' else m['role'] }}<|end_header_id|>\n\n"
        "{% if tools and m['role'] == 'user' and loop.index0 < 2 %}Given the following functions, respond with "
        '{"name": function name}.\n\n{% for t in tools %}{{ t | tojson(indent=4) }}\n\n{% endfor %}{% endif %}'
        "{% if m['tool_calls'] %}{{ m['tool_calls'] | tojson }}{% else %}" + said("<|image|>") + "{% endif %}<|eot_id|>"
        "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|image|>",
        tools=True,
    ),
    "qwen2-vl": Style(
        chatml(QWEN_IMAGE, QWEN_VIDEO, default="You are a helpful assistant."),
        ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"),
        "<|image_pad|>",
    ),
    "chatml-with-eos": Style(
        chatml("<image>", default="You are kind.") + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}",
        ("<|im_start|>", "<|im_end|>"),
    ),
    "numbered-pictures": Style(
        "{% set seen = namespace(images=0) %}"
        + chatml("{% set seen.images = seen.images + 1 %}Picture {{ seen.images }}: " + QWEN_IMAGE + "\n"),
        ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"),
        "<|image_pad|>",
        markers=("Picture",),
    ),
    "qwen3-vl": Style(
        SYSTEM_APART + "{% if tools %}<|im_start|>system\n{{ system }}\n\n# Tools\n{% for t in tools %}{{ t | tojson }}"
        "{% endfor %}<|im_end|>\n{% elif system %}<|im_start|>system\n{{ system }}<|im_end|>\n{% endif %}"
        "{% for m in talk %}{% if m['role'] == 'tool' %}"
        "{% if loop.first or loop.previtem['role'] != 'tool' %}<|im_start|>user{% endif %}"
        "\n<tool_response>\n" + said(QWEN_IMAGE) + "\n</tool_response>"
        "{% if loop.last or loop.nextitem['role'] != 'tool' %}<|im_end|>\n{% endif %}"
        "{% else %}<|im_start|>{{ m['role'] }}\n"
        + said(QWEN_IMAGE, QWEN_VIDEO)
        + "{% for c in m['tool_calls'] or [] %}"
        "\n<tool_call>\n{{ c['function'] | tojson }}\n</tool_call>{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"),
        "<|image_pad|>",
        tools=True,
        markers=("<tool_response>",),
    ),
    "internvl": Style(
        chatml("<IMG_CONTEXT>\n", default="You are InternVL."), ("<|im_start|>", "<|im_end|>"), "<IMG_CONTEXT>"
    ),
    "llava-onevision": Style(
        "{% for m in messages %}<|im_start|>{{ m['role'] }} "
        "{% for p in m['content'] if p['type'] == 'image' %}<image>\n{% endfor %}"
        "{% for p in m['content'] if p['type'] == 'text' %}{{ '\n' + p['text'] }}{% endfor %}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ("<|im_start|>", "<|im_end|>"),
    ),
    "first-turn-differs": Style(
        "{{ bos_token }}"
        + chatml(
            "<image>",
            user_header="{{ 'question' if m['role'] == 'user' and (loop.first or "
            "(loop.index0 == 1 and messages[0]['role'] == 'system')) else m['role'] }}",
        ),
        ("<|im_start|>", "<|im_end|>"),
    ),
    "gemma": Style(
        SYSTEM_APART + ALTERNATING + "{{ bos_token }}{% for m in talk %}<start_of_turn>"
        "{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{% if loop.first and system %}{{ system }}\n\n"
        "{% endif %}" + said("<start_of_image>", text="p['text'] | trim") + "<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        ("<start_of_turn>", "<end_of_turn>"),
        "<start_of_image>",
        "joined",
    ),
    "gemma2": Style(
        NO_SYSTEM + "{{ bos_token }}{% for m in messages %}<start_of_turn>"
        "{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        ("<start_of_turn>", "<end_of_turn>"),
        "",
        "refused",
    ),
    "idefics3": Style(
        "<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}:"
        "{% if m['content'][0]['type'] != 'image' %} {% endif %}" + said() + "<end_of_utterance>\n{% endfor %}"
        "{% if add_generation_prompt %}Assistant:{% endif %}",
        ("<|im_start|>", "<end_of_utterance>"),
        markers=("User:", "Assistant:"),
    ),
    "phi": Style(
        "{% for m in messages %}<|{{ m['role'] }}|>\n" + said("<|image|>") + "<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
        "<|image|>",
    ),
    "glm": Style(
        "[gMASK]<sop>{% for m in messages %}<|{{ 'observation' if m['role'] == 'tool' else m['role'] }}|>\n"
        + said("<|begin_of_image|><|image|><|end_of_image|>")
        + "{{ m['tool_calls'] | tojson if m['tool_calls'] else '' }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        (
            *("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|observation|>"),
            *("<|begin_of_image|>", "<|end_of_image|>"),
        ),
        "<|image|>",
        tools=True,
    ),
    "no-header": Style(
        NO_SYSTEM
        + "{% for m in messages %}{% if m['role'] == 'user' %}"
        + said()
        + "{% else %}\nAnswer: "
        + said()
        + "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}\nAnswer:{% endif %}",
        system="refused",
        markers=("Answer:",),
    ),
}
STYLES["qwen3-vl-tools-by-name"] = replace(
    STYLES["qwen3-vl"],
    template=STYLES["qwen3-vl"].template.replace("<tool_response>\n", "<tool_response>\n{{ m['name'] }}: "),
)


KINDS = ["bpe-special", "bpe-plain", "unigram-special", "unigram-plain"]
POLICIES = ["last_turn", "shortest_turn", "all_turns"]
SYSTEM = "You are terse.\n\nRules: 1. be <kind>; 2. no {lists}."
PER_IMAGE = 5


def unigram_tokenizer(*pieces: str) -> PreTrainedTokenizerFast:
    """Like Llama-2's: white space as a character of the next word, unknown characters as bytes."""
    words = {word for text in tiny._CORPUS for word in text.split()}
    vocabulary = [(token, 0.0) for token in ("<unk>", "<s>", "</s>", "<pad>")]
    vocabulary += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    vocabulary += [(chr(code), -8.0) for code in range(33, 127)] + [("▁", -8.0)]
    vocabulary += [(f"▁{word}", -5.0) for word in sorted(words)] + [(piece, -1.0) for piece in pieces]
    made = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@cache
def tokenizer(name: str, kind: str) -> PreTrainedTokenizerFast:
    style = STYLES[name]
    made = tiny.tokenizer() if kind.startswith("bpe") else unigram_tokenizer()
    special = (style.image, *(style.special if kind.endswith("special") else ()))
    made.add_tokens([AddedToken(text, special=True, normalized=False) for text in special if text])
    made.chat_template = style.template
    return made


@cache
def reader(name: str, kind: str, policy: str = "last_turn", system_prompts: tuple[str, ...] = ()) -> InstructionReader:
    words = tokenizer(name, kind)
    special = {1, 2, 3, *words.convert_tokens_to_ids([text for text in [STYLES[name].image] if text])}
    return InstructionReader(words, special, policy, system_prompts=system_prompts)


def user(*parts: str | None) -> dict:
    """None stands for an image."""
    said = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
    return {"role": "user", "content": said}


def message(role: str, text: str, **more) -> dict:
    return {"role": role, "content": [{"type": "text", "text": text}], **more}


def render(name: str, kind: str, talk: list[dict], *, generate: bool = True, **options) -> str:
    style = STYLES[name]
    if not style.image:
        talk = [{**m, "content": "".join(part.get("text", "") for part in m["content"])} for m in talk]
    text = tokenizer(name, kind).apply_chat_template(talk, tokenize=False, add_generation_prompt=generate, **options)
    return text.replace(style.image, style.image * PER_IMAGE) if style.image else text


def encode(name: str, kind: str, *texts: str, padding_side: str = "left") -> Prompt:
    words = tokenizer(name, kind)
    rows = words(list(texts), padding=True, padding_side=padding_side, return_tensors="pt", add_special_tokens=False)
    return Prompt(rows["input_ids"], rows["attention_mask"])


def prompt_of(name: str, kind: str, talk: list[dict], **options) -> Prompt:
    return encode(name, kind, render(name, kind, talk, **options))


def squeezed(text: str) -> str:
    return "".join(text.split())


WITH_IMAGES = [name for name, style in STYLES.items() if style.image]
every_kind = pytest.mark.parametrize("kind", KINDS)


def of_kinds(kinds: list[str], names: Iterable[str] = STYLES):
    """Each style with each kind of tokenizer; in the everyday tier, with one or two of them."""
    return pytest.mark.parametrize(("name", "kind"), some(2 if len(kinds) > 3 else 1, names, kinds))


# Text as people write it, short of the templates' own markers.
SNIPPETS = [
    "what is <b>this</b>, a [cat] | dog?",
    "if a < b:\n    print('x')\n\nelse:\n\tpass",
    "Context.\n\nAnswer the question.\nA. one\nB. two",
    "🐦 in 日本? 👩‍👩‍👧",
    "e\u0301\u200b! naïve café \u3000",
    "\N{REPLACEMENT CHARACTER}",
    "  spaced   out ",
    "{{ x }} </think>",
    *("ASSISTANT", "the USER says", "assistant: yes", "user", "INST", "<|im_sta", "0"),
]
CHARACTERS = st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"])
WORDS = st.one_of(
    st.sampled_from(SNIPPETS),
    st.text(CHARACTERS, min_size=1, max_size=25),
    st.lists(st.sampled_from(SNIPPETS), min_size=2, max_size=3).map(" ".join),
).filter(lambda text: text.strip())
MARKERS = {text for style in STYLES.values() for text in (*style.special, style.image, *style.markers) if text}
# The tokenizers' own, which hypothesis knows too: it tries texts that stand in the source of modules.
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")
QUESTIONS = WORDS.filter(lambda text: not any(squeezed(marker) in squeezed(text) for marker in {*MARKERS, *SPECIAL}))


@of_kinds(KINDS)
@settings(max_examples=budget(5, 15))
@given(
    turns=st.lists(QUESTIONS, min_size=1, max_size=3),
    answer=QUESTIONS,
    images=st.integers(0, 2),
    instructed=st.booleans(),
    ending=st.sampled_from(["asked", "generate", "answered"]),
    padding_side=st.sampled_from(["left", "right"]),
)
def test_user_turns_are_read_exactly(name, kind, turns, answer, images, instructed, ending, padding_side):
    style = STYLES[name]
    talk = [message("system", SYSTEM)] if instructed and style.system != "refused" else []
    for i, turn in enumerate(turns):
        talk += [user(*[None] * (images if i == 0 and style.image else 0), turn), message("assistant", answer)]
    talk = talk if ending == "answered" else talk[:-1]
    text = render(name, kind, talk, generate=ending == "generate")
    other = render(name, kind, [user("a second row, so that there is padding")])
    prompt = encode(name, kind, text, other, padding_side=padding_side)
    known = (SYSTEM,) if style.system == "joined" else ()
    own = [turn.strip() for turn in turns]
    for policy, expected in (("last_turn", {own[-1]}), ("all_turns", {" ".join(own)}), ("shortest_turn", {*own})):
        first, second = reader(name, kind, policy, known).texts(prompt)
        assert squeezed(first) in {squeezed(text) for text in expected}
        assert second == "a second row, so that there is padding"
        if kind.startswith("bpe"):
            assert first in expected


@of_kinds(KINDS, WITH_IMAGES)
def test_words_before_and_after_an_image_are_one_instruction(name, kind):
    talk = [user("why?"), message("assistant", "so"), user("is", None, "like\n", None, None, "or not?")]
    prompt = prompt_of(name, kind, talk)
    assert reader(name, kind).texts(prompt)[0].split() == ["is", "like", "or", "not?"]
    talk[-1] = user(None, "\n\n", "what?", "\n\n", None)
    ids = prompt_of(name, kind, talk).input_ids
    first, *_, last = ids[reader(name, kind).select(Prompt(ids))].tolist()
    assert all(tokenizer(name, kind).decode([token]).strip() for token in (first, last))


@pytest.mark.parametrize("name", ["qwen2-vl", "qwen3-vl"])
@every_kind
def test_videos_are_dropped(name, kind):
    talk = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "what happens?"}]}]
    text = render(name, kind, talk)
    words = copy.deepcopy(tokenizer(name, kind))
    words.add_tokens([AddedToken("<|video_pad|>", special=True, normalized=False)])
    [video] = words.convert_tokens_to_ids(["<|video_pad|>"])
    ids = words(text.replace("<|video_pad|>", "<|video_pad|>" * 9), return_tensors="pt")["input_ids"]
    assert InstructionReader(words, {1, 2, 3, video}, "last_turn").texts(Prompt(ids)) == ["what happens?"]


@of_kinds(KINDS, WITH_IMAGES)
def test_an_image_without_words_is_an_empty_instruction(name, kind):
    talk = [user(None, "what is it?"), message("assistant", "a bird"), user(None)]
    for earlier, expected in ((0, ["", "", ""]), (2, ["", "what is it?", "what is it?"])):
        prompt = prompt_of(name, kind, talk[2 - earlier :])
        assert [text for policy in POLICIES for text in reader(name, kind, policy).texts(prompt)] == expected


@every_kind
@pytest.mark.parametrize("name", [name for name, style in STYLES.items() if style.system == "joined"])
def test_unknown_system_text_joined_by_white_space_is_read(name, kind):
    """It could as well be a paragraph of the question, and to lose half a question is worse."""
    prompt = prompt_of(name, kind, [message("system", "You are terse."), user("why?")])
    assert reader(name, kind).texts(prompt) == ["You are terse.\n\nwhy?"]
    assert reader(name, kind, system_prompts=("Be kind.", "You are terse.")).texts(prompt) == ["why?"]


def tool_talk() -> list[dict]:
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "count", "arguments": {"what": "birds"}}}
    return [
        message("system", SYSTEM),
        user(None, "how many birds?"),
        message("assistant", "", tool_calls=[call]),
        message("tool", "seven birds", name="count", tool_call_id="abcdefghi"),
        message("tool", "or eight", name="count", tool_call_id="abcdefghi"),
    ]


COUNT = {
    "type": "function",
    "function": {
        "name": "count",
        "description": "Counts what the user names.",
        "parameters": {"type": "object", "properties": {"what": {"type": "string"}}},
    },
}


@pytest.mark.parametrize("name", [name for name, style in STYLES.items() if style.tools])
@every_kind
@pytest.mark.parametrize("defined", [False, True])
def test_tools_are_not_users(name, kind, defined):
    options = {"tools": [COUNT, {**COUNT, "note": [1, "{", {"a": "]"}]}]} if defined else {}
    talk = tool_talk()
    for length in (2, 4, 5):
        prompt = prompt_of(name, kind, talk[:length], **options)
        assert reader(name, kind, "all_turns").texts(prompt) == ["how many birds?"]
    later = [*talk, message("assistant", "seven"), user("sure?")]
    prompt = prompt_of(name, kind, later, **options)
    assert reader(name, kind).texts(prompt) == ["sure?"]
    assert reader(name, kind, "all_turns").texts(prompt) == ["how many birds? sure?"]


# --- Answers ------------------------------------------------------------------------------------------------------

ANSWERS = QUESTIONS | st.sampled_from(
    [
        *("", "USER: two ASSISTANT: three", "ASSISTANT:", "User: x", "<|im_end|>", "<|im_start|>user\nx", "</s>"),
        *("[INST]", "[/INST] x", "<|user|>", "<start_of_turn>user x"),
    ]
)


def pieces(name: str, kind: str, turns: list[str], answers: list[str], closing: bool) -> list[tuple[str, bool]]:
    """A conversation as ``(text, whether labels supervise it)``; ``closing``: also what closes an answer."""
    sentinels = [f"zz{i}zz" for i in range(len(turns))]
    talk = [m for turn, reply in zip(turns, sentinels, strict=True) for m in (user(turn), message("assistant", reply))]
    found, rest = [], render(name, kind, talk, generate=False)
    for i, reply in enumerate(answers):
        before, rest = rest.split(sentinels[i])
        end = render(name, kind, talk[: 2 * i + 2], generate=False).partition(sentinels[i])[2] if closing else ""
        end = end if rest.startswith(end) else end.removesuffix("</s>")  # written once, at the end of all
        assert rest.startswith(end)
        found += [(before, False), (reply + end, True)]
        rest = rest.removeprefix(end)
    return [*found, (rest, False)]


@of_kinds(["bpe-special", "bpe-plain", "unigram-plain"])
@settings(max_examples=budget(4, 10))
@given(
    turns=st.lists(QUESTIONS, min_size=1, max_size=3),
    answers=st.lists(ANSWERS, min_size=3, max_size=3),
    closing=st.booleans(),
    by_mask=st.booleans(),
)
def test_nothing_an_answer_says_changes_the_instruction(name, kind, turns, answers, closing, by_mask):
    words = tokenizer(name, kind)
    chosen: dict[str, list[list[int]]] = {policy: [] for policy in POLICIES}
    for replies in (answers[: len(turns)], ["fine"] * len(turns)):
        said = pieces(name, kind, turns, replies, closing)
        rows = [words(text, add_special_tokens=False)["input_ids"] for text, _ in said]
        ids = torch.tensor([[token for row in rows for token in row]])
        marks = torch.tensor([[on for row, (_, on) in zip(rows, said, strict=True) for _ in row]])
        labels, mask = (None, marks.long()) if by_mask else (torch.where(marks, ids, -100), None)
        for policy in POLICIES:
            selected = reader(name, kind, policy).select(Prompt(ids, None, labels, mask, trains=True))
            assert not (selected & marks).any()
            chosen[policy].append(ids[selected].tolist())
    assert all(one == other for one, other in chosen.values())
    assert squeezed(words.decode(chosen["last_turn"][0])) == squeezed(turns[-1])
    assert squeezed(words.decode(chosen["all_turns"][0])) == squeezed("".join(turns))


@of_kinds(["bpe-special", "unigram-plain"])
@settings(max_examples=budget(5, 15))
@given(data=st.data())
def test_other_answer_tokens_give_the_same_instruction(name, kind, data):
    words = tokenizer(name, kind)
    said = pieces(name, kind, ["is it?", "why not?"], ["yes and no", "because of a bird"], False)
    rows = [(words(text, add_special_tokens=False)["input_ids"], on) for text, on in said]
    ids = torch.tensor([[token for row, _ in rows for token in row]])
    marks = torch.tensor([[on for row, on in rows for _ in row]])
    for policy in POLICIES:
        other = ids.clone()
        other[marks] = torch.tensor(
            data.draw(st.lists(st.integers(0, len(words) - 1), min_size=int(marks.sum()), max_size=int(marks.sum())))
        )
        texts = [
            reader(name, kind, policy).texts(Prompt(row, None, assistant_mask=marks, trains=True))
            for row in (ids, other)
        ]
        assert texts[0] == texts[1] == [{"all_turns": "is it? why not?", "last_turn": "why not?"}.get(policy, "is it?")]
        [unlabelled] = reader(name, kind, policy).texts(Prompt(ids, trains=True))
        # "USER:" may be an answer's where answers aren't closed: without labels only the first turn is sure.
        assert [unlabelled] == (["is it?"] if name == "llava-1.5" else texts[0])


@pytest.mark.parametrize(("name", "header"), [("vicuna", "USER:"), ("idefics3", "User:"), ("llama2", "[INST]")])
def test_an_unlabelled_answer_may_quote_the_header_of_a_turn(name, header):
    talk = [user("what does it say?"), message("assistant", f"It says {header} hello"), user("who?")]
    talk += [message("assistant", "unknown"), user("why?")]
    prompt = prompt_of(name, "bpe-plain", talk)
    assert reader(name, "bpe-plain", "all_turns").texts(prompt) == ["what does it say? who? why?"]


def test_a_prompt_written_by_hand_may_not_close_its_answers():
    prompt = encode("vicuna", "bpe-plain", "USER: what? ASSISTANT: a bird USER: why? ASSISTANT: because USER: sure?")
    assert reader("vicuna", "bpe-plain", "all_turns").texts(prompt) == ["what? why? sure?"]


# --- Odd prompts --------------------------------------------------------------------------------------------------


@of_kinds(KINDS)
def test_a_conversation_may_be_cut_inside_a_question(name, kind):
    text = render(name, kind, [user("is it a bird or a plane?")])
    cut = text.index("a bird")
    assert reader(name, kind).texts(encode(name, kind, text[: cut + len("a bird")])) == ["is it a bird"]
    assert reader(name, kind).texts(encode(name, kind, text[cut:])) == ["a bird or a plane?"]


@of_kinds(KINDS)
def test_a_conversation_may_go_on_from_a_cached_one(name, kind):
    talk = [user("what?"), message("assistant", "a bird"), user("why?")]
    text = render(name, kind, talk)
    cut = text.index("a bird") + len("a bird")
    assert reader(name, kind, "all_turns").texts(encode(name, kind, text[cut:])) == ["why?"]


@pytest.mark.parametrize("name", ["qwen2-vl", "phi", "glm", "idefics3"])
def test_two_messages_in_a_row_are_two_turns(name):
    prompt = prompt_of(name, "bpe-special", [user("first"), user("second")])
    assert reader(name, "bpe-special").texts(prompt) == ["second"]


@pytest.mark.parametrize("name", ["qwen2-vl", "phi", "gemma", "llama3", "mistral-tools"])
def test_markers_typed_as_plain_text_are_words(name):
    """As tokenizers make of what users type with ``split_special_tokens``."""
    style, words = STYLES[name], tokenizer(name, "bpe-special")
    typed = f"what does {''.join(style.special)} mean?"
    before, after = render(name, "bpe-special", [user(None, "zzz")]).split("zzz")
    ids = [
        token
        for text, plain in ((before, False), (typed, True), (after, False))
        for token in words(text, add_special_tokens=False, split_special_tokens=plain)["input_ids"]
    ]
    assert reader(name, "bpe-special").texts(Prompt(torch.tensor([ids]))) == [typed]


def test_plain_markers_that_a_user_types_end_the_turn():
    prompt = prompt_of("vicuna", "bpe-plain", [user("what does ASSISTANT: mean?")])
    assert reader("vicuna", "bpe-plain").texts(prompt) == ["what does"]


def test_a_token_that_joins_a_marker_and_a_word_is_read_whole():
    words = unigram_tokenizer("?[/", "▁[INST]wha", "t")
    words.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %} [INST]{{ m['content'] }}[/INST]{% else %}"
    )
    words.chat_template += "{{ m['content'] }}</s>{% endif %}{% endfor %}"
    ids = words(" [INST]what is it?[/INST]", return_tensors="pt", add_special_tokens=False)["input_ids"]
    assert InstructionReader(words, {1, 2, 3}, "last_turn").texts(Prompt(ids)) == ["[INST]what is it?[/"]


# --- Templates that take or refuse this and that ------------------------------------------------------------------


def test_a_template_of_the_tokenizer_serves_a_processor_without_one():
    processor = tiny.processor()
    processor.chat_template, processor.tokenizer.chat_template = None, tiny.CHAT_TEMPLATE
    assert read_markers(processor) == read_markers(tiny.processor())
    processor.tokenizer.chat_template = None
    assert read_markers(processor) is None


def test_one_of_several_templates_may_be_for_tools():
    words = copy.deepcopy(tokenizer("qwen3-vl", "bpe-special"))
    words.chat_template = {"default": STYLES["qwen2-vl"].template, "tool_use": STYLES["qwen3-vl"].template}
    text = words.apply_chat_template(tool_talk(), tokenize=False, tools=[COUNT])
    ids = words(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    assert InstructionReader(words, {1, 2, 3}, "last_turn").texts(Prompt(ids)) == ["how many birds?"]


@pytest.mark.parametrize("assistant", ["m['content']", "m['content'][0]['text']", "(m['content'] | first).text"])
def test_users_may_send_parts_and_assistants_strings(assistant):
    words = tiny.tokenizer()
    words.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}Q: {% for p in m['content'] %}{{ p['text'] }}{% endfor %}"
        "\n{% else %}A: {{ " + assistant + " }}</s>\n{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
    )
    ids = words("Q: what?\nA: a bird</s>\nQ: why?\nA:", return_tensors="pt", add_special_tokens=False)["input_ids"]
    assert InstructionReader(words, {1, 2, 3}, "all_turns").texts(Prompt(ids)) == ["what? why?"]


@pytest.mark.parametrize(
    "template",
    [
        *("{{ raise_exception('no') }}", "always the same", "", "{{ messages[0]['content'] }}"),
        "{% for m in messages %}{{ m['content'] }} {% endfor %}",
    ],
)
def test_a_template_that_tells_nothing_has_no_markers(template):
    words = tiny.tokenizer()
    words.chat_template = template
    assert read_markers(words) is None


@pytest.mark.parametrize("processor", [None, object(), "a name"])
def test_what_has_no_template_has_no_markers(processor):
    assert read_markers(processor) is None


@of_kinds(KINDS)
def test_every_template_is_understood(name, kind):
    assert read_markers(tokenizer(name, kind)) == read_markers(copy.deepcopy(tokenizer(name, kind))) is not None


def test_a_reader_can_be_copied_and_pickled():
    made = reader("qwen3-vl", "bpe-special")
    prompt = prompt_of("qwen3-vl", "bpe-special", [user(None, "why?")])
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert twin.texts(prompt) == ["why?"]


def test_the_processor_of_a_model():
    processor = tiny.processor()
    talks = [
        [tiny.user("describe the image in detail"), tiny.assistant("a bird"), tiny.user("why?"), tiny.assistant("yes")],
        [message("system", "A chat."), user("is", None, "it?")],
    ]
    texts = [processor.apply_chat_template(talk) for talk in talks]
    inputs = processor(
        text=texts, images=[tiny.picture(0), tiny.picture(1), tiny.picture(2)], padding=True, return_tensors="pt"
    )
    prompt = Prompt(inputs["input_ids"], inputs["attention_mask"])
    assert InstructionReader(processor, {4}, "last_turn").texts(prompt) == ["why?", "is it?"]
    assert InstructionReader(processor, {4}, "shortest_turn").texts(prompt) == ["why?", "is it?"]


# --- Tokens and text ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bpe-special", "unigram-special"])
@given(data=st.data())
def test_tokens_are_found_again_from_their_text(kind, data):
    words = tokenizer("qwen2-vl", kind)
    texts = TokenTexts(words)
    if data.draw(st.booleans()):
        ids = words(data.draw(st.text(st.characters(codec="utf-8"), max_size=40)), add_special_tokens=False)[
            "input_ids"
        ]
        plain = squeezed(words.decode(ids, skip_special_tokens=False)).replace("\0", "").replace("\1", "")
        assert texts.row(ids).text.replace("\1", "") == plain
    else:
        ids = data.draw(st.lists(st.integers(-3, len(words) + 3), max_size=30))
    row = texts.row(ids)
    assert row.first[0] == row.offset[0] == 0
    assert row.first[-1] == len(ids)
    assert row.offset[-1] == len(row.text)
    start = data.draw(st.integers(0, len(row.text)))
    end = data.draw(st.integers(start, len(row.text)))
    found = row.tokens([(start, end)] if end > start else [])
    assert found == sorted(set(found))
    if end > start:
        assert row.text[start:end] in texts.row([ids[i] for i in range(found[0], found[-1] + 1)]).text
        assert set(row.tokens([(start, end)])) <= set(row.tokens([(0, len(row.text))])) <= set(range(len(ids)))


def test_placeholders_are_not_decoded_one_by_one(monkeypatch):
    words = copy.deepcopy(tokenizer("qwen2-vl", "bpe-special"))
    made = InstructionReader(words, {1, 2, 3}, "last_turn")
    text = render("qwen2-vl", "bpe-special", [user(None, "what is it? " * 50)])
    ids = words(text.replace("<|image_pad|>", "<|image_pad|>" * 500), return_tensors="pt")["input_ids"]
    decoded = []
    real = words.decode
    monkeypatch.setattr(words, "decode", lambda tokens, **options: decoded.append(tokens) or real(tokens, **options))
    made.select(Prompt(ids))
    assert ids.shape[1] > 2500
    assert len(decoded) <= len(ids.unique())
    decoded.clear()
    ids[0, -2] = 60
    made.select(Prompt(ids))
    assert len(decoded) <= 1


# --- Without a template -------------------------------------------------------------------------------------------


def bare(policy: str = "last_turn") -> InstructionReader:
    return InstructionReader(None, {1, 2, 3, 4}, policy)


def test_without_processor_the_whole_prompt_counts():
    ids = torch.tensor([[3, 3, 1, 4, 4, 10, 11, 2], [1, 12, 13, 14, 15, 16, 17, 18]])
    selected = bare().select(Prompt(ids, (ids != 3).long()))
    assert selected.tolist() == [[i in (10, 11) for i in ids[0]], [i >= 12 for i in ids[1]]]


@pytest.mark.parametrize("by_mask", [False, True])
def test_without_processor_labels_tell_turns_apart(by_mask):
    ids = torch.tensor([[1, 10, 11, 12, 50, 51, 2, 20, 60, 2, 30]])
    marks = torch.isin(ids, torch.tensor([50, 51, 60]))
    labels, mask = (None, marks) if by_mask else (torch.where(marks, ids, -100), None)
    prompt = Prompt(ids, torch.ones_like(ids), labels, mask, trains=True)
    chosen = {policy: ids[bare(policy).select(prompt)].tolist() for policy in POLICIES}
    assert chosen == {"last_turn": [20], "shortest_turn": [20], "all_turns": [10, 11, 12, 20]}


def test_labels_and_assistant_mask_may_differ():
    ids = torch.tensor([[1, 10, 11, 50, 51, 20, 21, 60]])
    labels = torch.where(ids == 60, ids, -100)
    mask = torch.isin(ids, torch.tensor([50, 51])).int()
    assert ids[bare("all_turns").select(Prompt(ids, None, labels, mask, trains=True))].tolist() == [10, 11, 20, 21]


@given(st.data())
def test_supervised_tokens_are_never_selected(data):
    length = data.draw(st.integers(2, 12))
    ids = torch.tensor([data.draw(st.lists(st.integers(5, 60), min_size=length, max_size=length))])
    supervised = torch.tensor([data.draw(st.lists(st.booleans(), min_size=length, max_size=length))])
    policy = data.draw(st.sampled_from(POLICIES))
    prompt = Prompt(ids, None, torch.where(supervised, ids, -100), trains=True)
    for made in (bare(policy), reader("vicuna", "bpe-plain", policy)):
        try:
            selected = made.select(prompt)
        except InstructionError:
            assert supervised.all()
            continue
        assert not (selected & supervised).any()
        assert selected.any()


def test_training_without_a_word_about_the_answer_is_an_error():
    ids = torch.tensor([[1, 10, 11], [1, 12, 13]])
    with pytest.raises(InstructionError, match="without labels"):
        bare().select(Prompt(ids, trains=True))
    # As transformers gives it for a template without {% generation %}.
    with pytest.raises(InstructionError, match="without labels"):
        bare().select(Prompt(ids, assistant_mask=torch.tensor([[0, 0, 1], [0, 0, 0]]), trains=True))
    assert bare().select(Prompt(ids, assistant_mask=torch.zeros_like(ids))).sum() == 4


@pytest.mark.parametrize("given", ["labels", "assistant_mask"])
def test_labels_of_another_shape_are_an_error(given):
    with pytest.raises(InstructionError, match=given.split("_")[0]):
        bare().select(Prompt(torch.ones(1, 4, dtype=torch.long), **{given: torch.ones(1, 3)}, trains=True))


def test_masks_of_another_shape_are_ignored():
    """transformers hands over 4-D masks and dictionaries of masks; only a 2-D one names padding."""
    ids = torch.tensor([[10, 11, 12]])
    assert bare().select(Prompt(ids, torch.zeros(1, 1, 3, 3))).all()


def test_rows_without_media_are_not_read():
    ids = torch.tensor([[10, 11, 12], [10, 11, 12]])
    selected = bare().select(Prompt(ids, has_media=torch.tensor([False, True])))
    assert selected.tolist() == [[False] * 3, [True] * 3]


@pytest.mark.parametrize("name", [None, "no-header"])
def test_labels_that_mask_only_images_and_special_tokens_are_an_error(name):
    words = tokenizer(name or "vicuna", "bpe-special")
    text = render(name or "vicuna", "bpe-special", [user(None, "is it?"), message("assistant", "yes")], generate=False)
    ids = words(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    special = torch.tensor(sorted(TokenTexts(words).special_ids))
    made = reader(name, "bpe-special") if name else InstructionReader(None, special.tolist(), "last_turn")
    with pytest.raises(InstructionError, match="supervise every token"):
        made.select(Prompt(ids, None, torch.where(torch.isin(ids, special), -100, ids), trains=True))


# --- Labels that supervise the prompt too -------------------------------------------------------------------------

HEADED = [name for name in STYLES if name != "no-header"]
quiet = pytest.mark.filterwarnings("ignore:labels supervise the instruction too")


def supervised(words, prompt: Prompt, masks: str) -> Prompt:
    """``masks``: which tokens labels leave out."""
    special = torch.tensor(sorted(TokenTexts(words).special_ids))
    ignored = torch.isin(prompt.input_ids, special) if masks == "special" else torch.zeros_like(prompt.input_ids).bool()
    if prompt.attention_mask is not None:
        ignored = ignored | (prompt.attention_mask == 0)
    return replace(prompt, labels=prompt.input_ids.masked_fill(ignored, -100), trains=True)


@quiet
@of_kinds(["bpe-special", "bpe-plain", "unigram-plain"], HEADED)
@settings(max_examples=budget(4, 10))
@given(data=st.data(), masks=st.sampled_from(["padding", "special"]), policy=st.sampled_from(POLICIES))
def test_labels_of_everything_leave_the_question_before_the_first_answer(name, kind, data, masks, policy):
    """Whatever answers say: also whole turns in the template's own words."""
    words = tokenizer(name, kind)
    forged = "".join(text for text, _ in pieces(name, kind, ["forged", "again"], ["fine", "so"], True))
    snippets = st.sampled_from([forged, forged[len(forged) // 3 :], forged[: len(forged) // 2]])
    turns = data.draw(st.lists(QUESTIONS, min_size=1, max_size=3))
    chosen = []
    for answers in (["fine"] * 3, data.draw(st.lists(ANSWERS | snippets, min_size=3, max_size=3))):
        said = pieces(name, kind, turns, answers[: len(turns)], True)
        rows = [words(text, add_special_tokens=False)["input_ids"] for text, _ in said]
        ids = torch.tensor([[token for row in rows for token in row]])
        marks = torch.tensor([[on for row, (_, on) in zip(rows, said, strict=True) for _ in row]])
        selected = reader(name, kind, policy).select(supervised(words, Prompt(ids), masks))
        assert not (selected & marks).any()
        chosen.append(ids[selected].tolist())
    assert chosen[0] == chosen[1]
    assert squeezed(words.decode(chosen[0])) == squeezed(turns[0])


@quiet
@pytest.mark.parametrize("name", HEADED)
@settings(max_examples=budget(4, 10))
@given(data=st.data())
def test_labels_of_everything_and_an_assistant_that_begins(name, data):
    """Rather no instruction than one from what may be an answer."""
    words = tokenizer(name, "bpe-special")
    forged = "".join(text for text, _ in pieces(name, "bpe-special", ["forged", "again"], ["fine", "so"], True))
    greeting = data.draw(ANSWERS | st.just(forged))
    talk = [message("assistant", "zz0zz"), user(None, "what?"), message("assistant", "fine")]
    try:
        text = render(name, "bpe-special", talk, generate=False)
    except Exception:  # noqa: BLE001 - many templates refuse this
        return
    before, after = text.split("zz0zz")
    if before.strip() in ("", "<s>"):
        return  # such a row begins as the answer says: nothing tells it from another conversation
    rows = [words(part, add_special_tokens=False)["input_ids"] for part in (before, greeting, after)]
    ids = torch.tensor([[token for row in rows for token in row]])
    marks = torch.zeros_like(ids, dtype=torch.bool)
    marks[0, len(rows[0]) : len(rows[0]) + len(rows[1])] = True
    try:
        selected = reader(name, "bpe-special", "all_turns").select(supervised(words, Prompt(ids), "padding"))
    except InstructionError:
        return
    assert not (selected & marks).any()


@quiet
@pytest.mark.parametrize("name", HEADED)
@pytest.mark.parametrize("text", ["a bird on a tree", "it says User: x", ""])
def test_labels_of_everything_in_a_row_that_is_no_conversation(name, text):
    prompt = encode(name, "bpe-special", f"{STYLES[name].image * 2}{text} yes")
    with pytest.raises(InstructionError, match=r"processor=.*InstructionCollator"):
        reader(name, "bpe-special").select(supervised(tokenizer(name, "bpe-special"), prompt, "padding"))


@quiet
def test_labels_of_everything_with_padding_and_an_image_alone():
    talks = [
        [user(None), message("assistant", "a bird"), user("why?"), message("assistant", "so")],
        [message("system", SYSTEM), user(None, "how many birds are there?"), message("assistant", "USER: two")],
    ]
    texts = [render("vicuna", "bpe-special", talk, generate=False) for talk in talks]
    for side in ("left", "right"):
        prompt = encode("vicuna", "bpe-special", *texts, padding_side=side)
        prompt = supervised(tokenizer("vicuna", "bpe-special"), prompt, "padding")
        assert reader("vicuna", "bpe-special").texts(prompt) == ["", "how many birds are there?"]


def test_labels_of_everything_warn_once_and_only_where_they_matter():
    words = tokenizer("phi", "bpe-special")
    made = InstructionReader(words, {1, 2, 3}, "last_turn")
    talk = [user(None, "is it?"), message("assistant", "yes")]
    for text in (None, "is it?"):
        alone = encode("phi", "bpe-special", render("phi", "bpe-special", [user(text), talk[1]], generate=False))
        prompt = supervised(words, alone, "padding")
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert [made.texts(prompt), made.texts(prompt)] == [[text or ""]] * 2
        assert [str(warning.message)[:36] for warning in said] == ["labels supervise the instruction too"] * bool(text)


def test_texts_need_a_tokenizer():
    with pytest.raises(InstructionError, match="processor="):
        bare().texts(Prompt(torch.tensor([[10, 11]])))
