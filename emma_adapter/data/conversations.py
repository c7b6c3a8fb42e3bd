"""Conversations with images, in the formats that datasets have, checked and brought into one form.

- chat templates': ``{"messages": [{"role": "user", "content": "…" or parts}, …], "images": […]}``, where parts may
  name images themselves, ``{"type": "image", "path": …}``, or as in OpenAI's, ``{"type": "image_url", …}``;
- LLaVA's: ``{"conversations": [{"from": "human", "value": "<image>\\n…"}, …], "image": …}``;
- single questions: ``{"image": …, "question": "…", "answer": "…"}``;
- ms-swift's ``{"query": "…", "response": "…", "history": [[query, response], …], "system": "…", "images": […]}``;
- TRL's ``{"prompt": …, "completion": …, "images": […]}``, texts or messages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from ..errors import DataError
from .images import as_data_url, shortened

#: A message for a chat template: ``role``, and ``content`` as a list of parts. ``weight`` is 0 in an answer that isn't
#: to be learned.
Message = dict[str, Any]

#: Columns of what is said in a row and of what it shows; one of ``TALK`` is needed.
TALK = ("messages", "conversations", "question", "query", "prompt")
SAID = (*TALK, "answer", "response", "history", "system", "completion")
SHOWN = ("images", "image")
_OTHER_MEDIA = {"videos": "video", "video": "video", "audios": "sound", "audio": "sound"}
MEDIA = (*SHOWN, *_OTHER_MEDIA)

_PLACEHOLDER = "<image>"
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_ROLES["developer"] = "system"
_TEXT_PARTS = ("text", "input_text", "output_text")
_IMAGE_PARTS = ("image", "image_url", "input_image")
#: Keys by which a part names its image.
_SOURCES = ("image", "path", "url", "image_url", "base64")
_CONTENT = 'a text, or a list of {"type": "text", "text": "…"} and {"type": "image"}'
_FORM = '{"images": ["PATH"], "messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}'


@dataclass(frozen=True)
class Conversation:
    """A row in the form that every command takes."""

    messages: list[Message]
    #: As :func:`~emma_adapter.data.images.open_image` takes them, in the order in which they are shown.
    images: list[Any]


def read_conversation(row: Mapping[str, Any], where: str, *, answered: bool = True) -> Conversation:
    """Return the conversation of a row with every image in its place.

    An image's place is where a part or ``<image>`` in a text says, or, if none does, before the first text of the user.

    Args:
        row: as in the data.
        where: the row's place, for messages.
        answered: refuse rows without an answer, from which nothing can be learned.

    Raises:
        DataError: if the row isn't a conversation, shows another number of images than it names, names them twice, or
            has a video.
    """
    for column, kind in _OTHER_MEDIA.items():
        if row.get(column):
            raise DataError(_unsupported(kind, where))
    row_images = named_images(row, where)
    messages: list[Message] = []
    shown_sources: list[Any] = []
    for number, turn in enumerate(_turns(row, where), 1):
        message, sources = _message(turn, f"{where}, turn {number}")
        messages.append(message)
        shown_sources += sources
    _check_order(messages, where, answered=answered)
    if not shown_sources:
        first = next(message for message in messages if message["role"] == "user")
        first["content"] = [{"type": "image"}] * len(row_images) + first["content"]
    images = _matched(shown_sources, row_images, where) if shown_sources else row_images
    _check_questions(messages, where)
    return Conversation(messages, images)


def count_images(messages: list[Message]) -> int:
    return sum(part["type"] == "image" for message in messages for part in message["content"])


def trainable_turns(messages: list[Message]) -> list[int]:
    """Return the positions of answers that an adapter can learn from: those before which an image was shown."""
    return [
        number
        for number, message in enumerate(messages)
        if message["role"] == "assistant" and message.get("weight") != 0 and count_images(messages[:number])
    ]


def named_images(row: Mapping[str, Any], where: str) -> list[Any]:
    """Return the images of a row's own columns.

    Raises:
        DataError: if two columns name different ones.
    """
    values = [row[column] for column in SHOWN if row.get(column) is not None]
    lists = [list(value) if isinstance(value, (list, tuple)) else [value] for value in values]
    if len(lists) == 2 and lists[0] != lists[1]:
        raise DataError(f'{where}: "images" and "image" name different images: leave one of them out')
    return lists[0] if lists else []


def check_characters(text: str, where: str) -> None:
    """Check that a tokenizer can read a text.

    Raises:
        DataError: if it holds half a character.
    """
    if not text.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise DataError(f"{where}: the text holds half a character (a lone surrogate): repair its encoding")


def _matched(shown_sources: list[Any], row_images: list[Any], where: str) -> list[Any]:
    """Return the images that parts and placeholders show: those they name, or the row's, in turn or by number."""
    named_sources = [source for source in shown_sources if source is not None]
    if named_sources and all(isinstance(source, _Number) for source in shown_sources):
        if sorted({source.place for source in shown_sources}) == list(range(len(row_images))):
            return [row_images[source.place] for source in shown_sources]
    elif len(named_sources) == len(shown_sources) and (not row_images or row_images == shown_sources):
        return shown_sources
    elif not named_sources and len(row_images) == len(shown_sources):
        return row_images
    elif named_sources and len(named_sources) == len(shown_sources):
        raise DataError(
            f'{where}: the turns name {len(named_sources)} image(s) and "images" names {len(row_images)} others: leave '
            "one of them out"
        )
    raise DataError(
        f"{where}: the turns show {len(shown_sources)} image(s) and the row names {len(row_images)}: name one in "
        f'"images" for each {_PLACEHOLDER} or part {{"type": "image"}}, or all of them in the parts'
    )


@dataclass(frozen=True)
class _Number:
    """The ``index`` by which a part refers to an image of the row."""

    place: int


def _turns(row: Mapping[str, Any], where: str) -> list[Any]:
    turns = row.get("messages")
    if turns is None:
        turns = row.get("conversations")
    if turns is None and row.get("question") is not None:
        turns = _exchange(row["question"], row.get("answer"))
    if turns is None and row.get("query") is not None:
        earlier = row.get("history") or []
        if not isinstance(earlier, list) or not all(
            isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in earlier
        ):
            raise DataError(f'{where}: "history" must be a list of pairs, [query, response]')
        turns = [turn for pair in earlier for turn in _exchange(*pair)] + _exchange(row["query"], row.get("response"))
    if turns is None and row.get("prompt") is not None:
        prompt, completion = row["prompt"], row.get("completion")
        turns = prompt if isinstance(prompt, list) else _exchange(prompt, None)
        if isinstance(turns, list) and completion is not None:
            turns = [*turns, *(completion if isinstance(completion, list) else _exchange(None, completion))]
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{where}: there are no messages; a row looks like {_FORM}")
    return [{"role": "system", "content": row["system"]}, *turns] if row.get("system") else turns


def _exchange(question: Any, answer: Any) -> list[Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return [turn for turn in turns if turn["content"] is not None]


def _message(turn: Any, where: str) -> tuple[Message, list[Any]]:
    """Return a message, and the images that its parts name; None for each part that names none."""
    if not isinstance(turn, Mapping):
        raise DataError(f"{where} is no message but {shortened(turn)}; a row looks like {_FORM}")
    speaker = turn.get("role", turn.get("from"))
    role = _ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise DataError(f"{where}: the role is {shortened(speaker)}; it must be one of {', '.join(_ROLES)}")
    content = turn.get("content", turn.get("value"))
    items = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(items, list):
        raise DataError(f"{where}: the content is {shortened(content)}; it must be {_CONTENT}")
    parts: list[dict[str, str]] = []
    sources: list[Any] = []
    for item in items:
        item_parts, source = _parts(item, where)
        parts += item_parts
        sources += [source] * sum(part["type"] == "image" for part in item_parts)
    if role != "user" and sources:
        raise DataError(f"{where}: an image in a turn of the {role}; only users show images")
    if role == "assistant" and not any(part["text"].strip() for part in parts):
        raise DataError(f"{where}: the answer is empty: leave the turn out, or write what the model should say")
    # OpenAI and ms-swift mark an answer in this way if it is context, and not to be learned.
    unlearned = role == "assistant" and (turn.get("weight") == 0 or turn.get("loss") is False)
    return {"role": role, "content": parts, **({"weight": 0} if unlearned else {})}, sources


def _parts(item: Any, where: str) -> tuple[list[dict[str, str]], Any]:
    """Return the parts that an item of a content stands for, and the image that it names."""
    item = {"type": "text", "text": item} if isinstance(item, str) else item
    kind = item.get("type") if isinstance(item, Mapping) else None
    if kind in _IMAGE_PARTS:
        return [{"type": "image"}], _source(item, where)
    for medium in ("video", "audio"):
        if isinstance(kind, str) and medium in kind:
            raise DataError(_unsupported({"video": "video", "audio": "sound"}[medium], where))
    text = item.get("text") if kind in _TEXT_PARTS else None
    if not isinstance(text, str):
        raise DataError(f"{where}: a part of the content is {shortened(item)}; the content must be {_CONTENT}")
    check_characters(text, where)
    first, *rest = text.split(_PLACEHOLDER)
    parts = [_text(first, stripped=bool(rest))]
    for piece in rest:
        parts += [{"type": "image"}, _text(piece, stripped=True)]
    return [part for part in parts if part["type"] == "image" or part["text"] or not rest], None


def _source(part: Mapping[str, Any], where: str) -> Any:
    """Return the image that a part names; None if it names none."""
    sources = {name: part[name] for name in _SOURCES if part.get(name) is not None}
    if len(sources) > 1:
        raise DataError(f"{where}: a part names its image {len(sources)} times, as {', '.join(sources)}: leave one")
    for name, value in sources.items():
        # OpenAI's {"image_url": {"url": …, "detail": …}}.
        source = value["url"] if isinstance(value, Mapping) and "url" in value else value
        return as_data_url(source) if name == "base64" and isinstance(source, str) else source
    index = part.get("index")
    return _Number(index) if isinstance(index, int) and not isinstance(index, bool) else None


def _unsupported(kind: str, where: str) -> str:
    return (
        f"{where}: the row has a {kind}, and only images are read: leave the row out, name frames as images, or train "
        "with a script of your own, which takes what the model's processor takes"
    )


def _text(text: str, *, stripped: bool) -> dict[str, str]:
    # The chat template itself writes the line break beside a placeholder.
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


def _check_questions(messages: list[Message], where: str) -> None:
    """Check that the user asks something each time; consecutive turns are one question."""
    number = 0
    for role, turns in groupby(messages, key=lambda message: message["role"]):
        group = list(turns)
        number += len(group)
        if role == "user" and not any(part.get("text", "").strip() for turn in group for part in turn["content"]):
            raise DataError(
                f"{where}, turn {number}: the question is empty: write what is asked, or leave it and its answer out"
            )
