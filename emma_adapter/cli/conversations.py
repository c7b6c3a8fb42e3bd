"""Conversations in the forms that image datasets come in, checked and brought into one.

``{"messages": [{"role": "user", "content": "…" or parts}, …], "images": […]}``, and LLaVA's own
``{"conversations": [{"from": "human", "value": "<image>\\n…"}, …], "image": …}``; for single questions also
``{"image": …, "question": "…", "answer": "…"}``.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from ..errors import DataError

#: A message for a chat template: ``role``, and ``content`` as a list of parts.
Message = dict[str, Any]

_PLACEHOLDER = "<image>"
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_CONTENT = 'a text, or a list of {"type": "text", "text": "…"} and {"type": "image"}'
_FORM = '{"images": ["PATH"], "messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}'


def read_messages(row: Mapping[str, Any], num_images: int, where: str, *, answered: bool = True) -> list[Message]:
    """The messages of a row with every image at its place: where a part or ``<image>`` in a text says, or, if none
    does, before the first user's text.

    Args:
        row: as in the data.
        num_images: how many images the row names.
        where: the row's place, for messages.
        answered: refuse rows without an answer, or with an empty question, from which nothing can be learned.

    Raises:
        DataError: if the row isn't a conversation, or shows another number of images than it names.
    """
    messages = [_message(turn, f"{where}, turn {number}") for number, turn in enumerate(_turns(row, where), 1)]
    _check_order(messages, where, answered=answered)
    shown = count_images(messages)
    if not shown and num_images:
        first = next(message for message in messages if message["role"] == "user")
        first["content"] = [{"type": "image"}] * num_images + first["content"]
    elif shown != num_images:
        raise DataError(
            f'{where}: the turns show {shown} image(s) and the row names {num_images}: name one in "images" for each '
            f'{_PLACEHOLDER} or part {{"type": "image"}}'
        )
    for number, (asked, answer) in enumerate(pairwise(messages), 1):
        if answered and answer["role"] == "assistant" and not has_words(asked):
            raise DataError(
                f"{where}, turn {number}: the question is empty, so that an adapter would learn nothing from its "
                "answer: write what is asked, or leave the two turns out"
            )
    return messages


def count_images(messages: list[Message]) -> int:
    return sum(part["type"] == "image" for message in messages for part in message["content"])


def has_words(message: Message) -> bool:
    return any(part["type"] == "text" and part["text"].strip() for part in message["content"])


def trainable_turns(messages: list[Message]) -> list[int]:
    """Positions of the answers that can teach an adapter something: those before which an image was shown."""
    return [
        number
        for number, message in enumerate(messages)
        if message["role"] == "assistant" and count_images(messages[:number])
    ]


def _turns(row: Mapping[str, Any], where: str) -> list[Any]:
    turns = row.get("messages", row.get("conversations"))
    if turns is None and row.get("question") is not None:
        answer = row.get("answer")
        turns = [{"role": "user", "content": row["question"]}]
        turns += [] if answer is None else [{"role": "assistant", "content": answer}]
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{where}: there are no messages; a row looks like {_FORM}")
    return turns


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, Mapping):
        raise DataError(f"{where} is no message but {_shortened(turn)}; a row looks like {_FORM}")
    said = turn.get("role", turn.get("from"))
    role = _ROLES.get(said) if isinstance(said, str) else None
    if role is None:
        raise DataError(f"{where}: the role is {_shortened(said)}; it must be one of {', '.join(_ROLES)}")
    content = turn.get("content", turn.get("value"))
    given = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(given, list):
        raise DataError(f"{where}: the content is {_shortened(content)}; it must be {_CONTENT}")
    parts = [part for item in given for part in _parts(item, where)]
    if role != "user" and any(part["type"] == "image" for part in parts):
        raise DataError(f"{where}: an image in a turn of the {role}; only users show images")
    message: Message = {"role": role, "content": parts}
    if role == "assistant" and not has_words(message):
        raise DataError(f"{where}: the answer is empty: leave the turn out, or write what the model should say")
    return message


def _parts(item: Any, where: str) -> list[dict[str, str]]:
    kind = item.get("type") if isinstance(item, Mapping) else None
    if kind == "image":
        return [{"type": "image"}]
    text = item.get("text") if kind == "text" else None
    if not isinstance(text, str):
        raise DataError(f"{where}: a part of the content is {_shortened(item)}; the content must be {_CONTENT}")
    if not text.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise DataError(f"{where}: the text holds half a character (a lone surrogate): repair its encoding")
    first, *rest = text.split(_PLACEHOLDER)
    parts = [_text(first, stripped=bool(rest))]
    for piece in rest:
        parts += [{"type": "image"}, _text(piece, stripped=True)]
    return [part for part in parts if part["type"] == "image" or part["text"] or not rest]


def _text(text: str, *, stripped: bool) -> dict[str, str]:
    # The line break beside a placeholder is the chat template's to write.
    return {"type": "text", "text": text.strip() if stripped else text}


def _check_order(messages: list[Message], where: str, *, answered: bool) -> None:
    roles = [message["role"] for message in messages]
    if answered and "assistant" not in roles:
        raise DataError(f"{where}: no turn of the assistant, so that there is nothing to learn: add the answer")
    for number, role in enumerate(roles):
        if role == "assistant" and (number == 0 or roles[number - 1] != "user"):
            raise DataError(f"{where}, turn {number + 1}: an answer must follow a turn of the user")
    if "user" not in roles:
        raise DataError(f"{where}: no turn of the user, so that nothing is asked: add the question")


def _shortened(value: Any) -> str:
    text = repr(value) if not isinstance(value, (list, Mapping)) else f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:60]}…"
