"""Tokenizers in the style of each family, and chat templates that write what the published ones do."""

from __future__ import annotations

from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from tests.support import tiny

CHATML = {
    "user": "<|im_start|>user\n{}<|im_end|>\n",
    "assistant": "<|im_start|>assistant\n{}<|im_end|>\n",
    "system": "<|im_start|>system\n{}<|im_end|>\n",
}


def tokenizer(
    *,
    bos: str | None = None,
    eos: str,
    pad: str,
    prepend_bos: bool = False,
    names: dict[str, str] | None = None,
    others: tuple[str, ...] = (),
) -> PreTrainedTokenizerFast:
    """A byte-level BPE with a family's special tokens.

    ``names`` are those that processors look for as attributes of the tokenizer (``image_token``, …).
    """
    names = names or {}
    made = Tokenizer.from_str(tiny.tokenizer().backend_tokenizer.to_str())
    made.add_special_tokens([token for token in (bos, eos, pad, *names.values(), *others) if token])
    if prepend_bos:
        made.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B:1", special_tokens=[(bos, made.token_to_id(bos))]
        )
    else:
        made.post_processor = processors.ByteLevel(trim_offsets=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        unk_token="<unk>",
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        padding_side="left",
        extra_special_tokens=names,
    )


def chat_template(
    *,
    user: str,
    assistant: str,
    system: str,
    image: str,
    video: str = "",
    start: str = "",
    default_system: str | None = None,
    system_in_first_user: bool = False,
    text: str = "part.text",
    space_before_text: bool = False,
    generation: str | None = None,
) -> str:
    """A Jinja template out of patterns of one message each; ``{}`` is where its content goes.

    ``text`` is what is made of a part's text. ``space_before_text``: a message that doesn't begin with an image begins
    with a space. ``generation`` is the generation prompt; by default what precedes an answer's content, so that a
    prompt is the beginning of its answered conversation.
    """
    parts = (
        "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
        f"{{% if part.type == 'image' %}}{_say(image)}{{% elif part.type == 'video' %}}{_say(video)}"
        f"{{% else %}}{{{{ {text} }}}}{{% endif %}}{{% endfor %}}{{% endif %}}"
    )
    if space_before_text:
        parts = f"{{% if message.content[0].type != 'image' %}} {{% endif %}}{parts}"
    before_system, after_system = system.split("{}")
    before_user, after_user = user.split("{}")
    before_answer, after_answer = assistant.split("{}")
    made = _say(start)
    if default_system is not None:
        made += f"{{% if messages[0].role != 'system' %}}{_say(system.format(default_system))}{{% endif %}}"
    made += "{% for message in messages %}"
    made += f"{{% if message.role == 'system' %}}{_say(before_system)}{parts}{_say(after_system)}"
    made += "{% elif message.role == 'user' %}"
    opening = _say(before_user)
    if system_in_first_user:
        opening = f"{{% if loop.index0 == 0 or messages[loop.index0 - 1].role != 'system' %}}{opening}{{% endif %}}"
    made += f"{opening}{parts}{_say(after_user)}"
    made += f"{{% else %}}{_say(before_answer)}{parts}{_say(after_answer)}{{% endif %}}"
    generation = before_answer.rstrip(" ") if generation is None else generation
    return f"{made}{{% endfor %}}{{% if add_generation_prompt %}}{_say(generation)}{{% endif %}}"


def _say(text: str) -> str:
    return f"{{{{ {text!r} }}}}" if text else ""
