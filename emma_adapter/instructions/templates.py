"""Where user turns begin and end, read off a processor's own chat template."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Unlikely in any template, and without spaces, which the search ignores.
_USER, _ANSWER, _NEXT = "⌘emma-user⌘", "⌘emma-answer⌘", "⌘emma-next⌘"

#: Stands for an answer that is known from labels: no marker is looked for in it or across it.
BARRIER = "\0"


@dataclass(frozen=True)
class TurnMarkers:
    """Literal text around a user turn, without white space (tokenizers add and drop it).

    ``starts`` are the possible texts before a user turn, ``end`` the text after it: the assistant's header.
    """

    starts: tuple[str, ...]
    end: str

    def user_spans(self, text: str) -> list[tuple[int, int]]:
        """``(start, end)`` of each user turn in a conversation without white space. Turns end at a ``BARRIER``."""
        spans = []
        position = 0
        while (start := self._next_start(text, position)) is not None:
            ends = [end for end in (text.find(self.end, start), text.find(BARRIER, start)) if end >= 0]
            position = min(ends, default=len(text))
            spans.append((start, position))
        return spans

    def _next_start(self, text: str, position: int) -> int | None:
        found = [(at, len(start)) for start in self.starts if (at := text.find(start, position)) >= 0]
        if not found:
            return None
        first = min(at for at, _ in found)
        return first + max(length for at, length in found if at == first)


def read_markers(processor: Any) -> TurnMarkers | None:
    """The markers of ``processor.apply_chat_template``, or None if there is no template that tells turns apart."""
    for as_parts in (True, False):
        exchange = [_message("user", _USER, as_parts), _message("assistant", _ANSWER, as_parts)]
        try:
            answered = processor.apply_chat_template(exchange, tokenize=False)
            text = processor.apply_chat_template(
                [*exchange, _message("user", _NEXT, as_parts)], tokenize=False, add_generation_prompt=True
            )
        except Exception:  # noqa: BLE001 - a template is a program of the user's; whatever it raises, it has no markers
            continue
        closing = _squeeze(answered).rpartition(_ANSWER)[2]
        markers = _markers_around_sentinels(_squeeze(text), closing)
        if markers is not None:
            return markers
    return None


def _message(role: str, text: str, as_parts: bool) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}] if as_parts else text}


def _markers_around_sentinels(text: str, closing: str) -> TurnMarkers | None:
    """``closing`` is what the template writes after an answer; it belongs to the answer, not to the next turn."""
    at = [text.find(sentinel) for sentinel in (_USER, _ANSWER, _NEXT)]
    if min(at) < 0 or at != sorted(at):
        return None
    before_first = text[: at[0]]
    end = text[at[0] + len(_USER) : at[1]]
    before_next = text[at[1] + len(_ANSWER) : at[2]]
    before_next = before_next.removeprefix(closing) or before_next
    if not end:
        return None
    # What precedes every user turn: what both have in common at their end.
    shared = _common_suffix(before_first, before_next)
    starts = (shared,) if shared else tuple(start for start in (before_first, before_next) if start)
    return TurnMarkers(starts, end) if starts else None


def _squeeze(text: str) -> str:
    return "".join(text.split())


def _common_suffix(one: str, other: str) -> str:
    length = 0
    for a, b in zip(reversed(one), reversed(other), strict=False):
        if a != b:
            break
        length += 1
    return one[len(one) - length :]
