"""Conversations with images in the forms that datasets come in, checked and brought into one.

- of chat templates: ``{"messages": [{"role": "user", "content": "…" or parts}, …], "images": […]}``, where parts may
  name images themselves, ``{"type": "image", "path": …}``, also as OpenAI has it, ``{"type": "image_url", …}``;
- LLaVA's own: ``{"conversations": [{"from": "human", "value": "<image>\\n…"}, …], "image": …}``;
- of single questions: ``{"image": …, "question": "…", "answer": "…"}``;
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

#: What a row may say, and show; one of the first is needed.
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
#: Where a part names its image.
_SOURCES = ("image", "path", "url", "image_url", "base64")
_CONTENT = 'a text, or a list of {"type": "text", "text": "…"} and {"type": "image"}'
_FORM = '{"images": ["PATH"], "messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}'


@dataclass(frozen=True)
class Conversation:
    """A row as every command takes it."""

    messages: list[Message]
    #: What :func:`~emma_adapter.data.images.open_image` takes, in the order in which they are shown.
    images: list[Any]


def read_conversation(row: Mapping[str, Any], where: str, *, answered: bool = True) -> Conversation:
    """Return the conversation of a row with every image at its place: where a part or ``<image>`` in a text says, or,
    if none does, before the first user's text.

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
    named = named_images(row, where)
    messages: list[Message] = []
    shown: list[Any] = []
    for number, turn in enumerate(_turns(row, where), 1):
        message, sources = _message(turn, f"{where}, turn {number}")
        messages.append(message)
        shown += sources
    _check_order(messages, where, answered=answered)
    if not shown:
        first = next(message for message in messages if message["role"] == "user")
        first["content"] = [{"type": "image"}] * len(named) + first["content"]
    images = _matched(shown, named, where) if shown else named
    _check_questions(messages, where)
    return Conversation(messages, images)


def count_images(messages: list[Message]) -> int:
    return sum(part["type"] == "image" for message in messages for part in message["content"])


def trainable_turns(messages: list[Message]) -> list[int]:
    """Positions of the answers that can teach an adapter something: those before which an image was shown."""
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
    given = [row[column] for column in SHOWN if row.get(column) is not None]
    lists = [list(one) if isinstance(one, (list, tuple)) else [one] for one in given]
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


def _matched(shown: list[Any], named: list[Any], where: str) -> list[Any]:
    """The images of the parts and placeholders, which name them, or are a row's images in turn or by number."""
    own = [source for source in shown if source is not None]
    if own and all(isinstance(source, _Number) for source in shown):
        if sorted({source.place for source in shown}) == list(range(len(named))):
            return [named[source.place] for source in shown]
    elif len(own) == len(shown) and (not named or named == shown):
        return shown
    elif not own and len(named) == len(shown):
        return named
    elif own and len(own) == len(shown):
        raise DataError(
            f'{where}: the turns name {len(own)} image(s) and "images" names {len(named)} others: leave one of them out'
        )
    raise DataError(
        f'{where}: the turns show {len(shown)} image(s) and the row names {len(named)}: name one in "images" for each '
        f'{_PLACEHOLDER} or part {{"type": "image"}}, or all of them in the parts'
    )


@dataclass(frozen=True)
class _Number:
    """A part's ``index`` of an image of the row."""

    place: int


def _turns(row: Mapping[str, Any], where: str) -> list[Any]:
    turns = row.get("messages")
    if turns is None:
        turns = row.get("conversations")
    if turns is None and row.get("question") is not None:
        turns = _said(row["question"], row.get("answer"))
    if turns is None and row.get("query") is not None:
        earlier = row.get("history") or []
        if not isinstance(earlier, list) or not all(
            isinstance(one, (list, tuple)) and len(one) == 2 for one in earlier
        ):
            raise DataError(f'{where}: "history" must be a list of pairs, [query, response]')
        turns = [turn for one in earlier for turn in _said(*one)] + _said(row["query"], row.get("response"))
    if turns is None and row.get("prompt") is not None:
        prompt, completion = row["prompt"], row.get("completion")
        turns = prompt if isinstance(prompt, list) else _said(prompt, None)
        if isinstance(turns, list) and completion is not None:
            turns = [*turns, *(completion if isinstance(completion, list) else _said(None, completion))]
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{where}: there are no messages; a row looks like {_FORM}")
    return [{"role": "system", "content": row["system"]}, *turns] if row.get("system") else turns


def _said(question: Any, answer: Any) -> list[Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return [turn for turn in turns if turn["content"] is not None]


def _message(turn: Any, where: str) -> tuple[Message, list[Any]]:
    """A message, and the images of its parts: what they name, None where they name nothing."""
    if not isinstance(turn, Mapping):
        raise DataError(f"{where} is no message but {shortened(turn)}; a row looks like {_FORM}")
    said = turn.get("role", turn.get("from"))
    role = _ROLES.get(said) if isinstance(said, str) else None
    if role is None:
        raise DataError(f"{where}: the role is {shortened(said)}; it must be one of {', '.join(_ROLES)}")
    content = turn.get("content", turn.get("value"))
    given = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(given, list):
        raise DataError(f"{where}: the content is {shortened(content)}; it must be {_CONTENT}")
    parts: list[dict[str, str]] = []
    sources: list[Any] = []
    for item in given:
        made, source = _parts(item, where)
        parts += made
        sources += [source] * sum(part["type"] == "image" for part in made)
    if role != "user" and sources:
        raise DataError(f"{where}: an image in a turn of the {role}; only users show images")
    if role == "assistant" and not any(part["text"].strip() for part in parts):
        raise DataError(f"{where}: the answer is empty: leave the turn out, or write what the model should say")
    # As OpenAI and ms-swift mark an answer that is context, and not to be learned.
    unlearned = role == "assistant" and (turn.get("weight") == 0 or turn.get("loss") is False)
    return {"role": role, "content": parts, **({"weight": 0} if unlearned else {})}, sources


def _parts(item: Any, where: str) -> tuple[list[dict[str, str]], Any]:
    """The parts that an item of a content stands for, and the image that it names."""
    item = {"type": "text", "text": item} if isinstance(item, str) else item
    kind = item.get("type") if isinstance(item, Mapping) else None
    if kind in _IMAGE_PARTS:
        return [{"type": "image"}], _source(item, where)
    for other in ("video", "audio"):
        if isinstance(kind, str) and other in kind:
            raise DataError(_unsupported({"video": "video", "audio": "sound"}[other], where))
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
    """What a part names as its image; None if nothing."""
    given = {name: part[name] for name in _SOURCES if part.get(name) is not None}
    if len(given) > 1:
        raise DataError(f"{where}: a part names its image {len(given)} times, as {', '.join(given)}: leave one")
    for name, value in given.items():
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


def _check_questions(messages: list[Message], where: str) -> None:
    """Check that the user asks something each time; several turns in a row are one question."""
    number = 0
    for role, turns in groupby(messages, key=lambda message: message["role"]):
        own = list(turns)
        number += len(own)
        if role == "user" and not any(part.get("text", "").strip() for turn in own for part in turn["content"]):
            raise DataError(
                f"{where}, turn {number}: the question is empty: write what is asked, or leave it and its answer out"
            )
