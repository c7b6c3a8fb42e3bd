"""Searching a conversation for what a chat template writes around user turns."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from json import JSONDecodeError

from .decoding import BARRIER, SPECIAL

# What well-known templates write before an answer. Role words in plain text count only as they write them.
_ANSWER_HEADER = re.compile(
    r"<\|im_start\|>assistant|<\|start\|>assistant(?:<\|message\|>)?|<\|assistant\|>|<\|CHATBOT_TOKEN\|>"
    r"|<\|start_header_id\|>assistant<\|end_header_id\|>|<\uff5cAssistant\uff5c>|<start_of_turn>model|<\|turn>model"
    r"|\[/INST\]|ASSISTANT:|Assistant:|###Response:"
)
_JSON = json.JSONDecoder(strict=False)


@dataclass(frozen=True)
class UserTurn:
    """``parts`` are the ``(start, end)`` of a user's own words, empty if the turn has none."""

    parts: tuple[tuple[int, int], ...]
    #: True if an answer follows, or the user's words were taken for one, before the template closes the turn.
    interrupted: bool


@dataclass(frozen=True)
class TurnMarkers:
    """What a template writes around user turns, in the text of a :class:`~.decoding.DecodedRow`."""

    #: Text before a user's words; in the group ``tool`` if a tool's result follows, in what looks like a user turn.
    start: re.Pattern[str]
    #: Text after a user's words.
    end: re.Pattern[str]
    #: Text between a user's words and the answer.
    answer: re.Pattern[str]
    #: Text that announces an answer, whatever stands before it.
    answer_header: re.Pattern[str]
    #: What closes a message before the next user turn, if the template closes answers.
    closings: tuple[str, ...]
    #: Around system text that the template writes into a user turn.
    system: tuple[str, str] | None
    #: Around tool definitions, which are JSON, that the template writes into a user turn.
    definitions: tuple[str, str] | None
    #: An image or video and the words that the template writes for it.
    media: re.Pattern[str] | None
    #: True if nothing announces the first turn.
    headless: bool
    #: True if words announce a turn, as "USER:", and no tag or special token: answers may well quote them.
    in_words: bool

    def user_turns(self, text: str, *, holds_answers: bool = False) -> list[UserTurn]:
        """The user turns of a conversation, in order. A ``BARRIER`` ends a turn.

        ``holds_answers``: the text has answers in it, which may quote the template.
        """
        if holds_answers and self.in_words and not self.closings:
            # Nothing tells a later turn from an answer that quotes one.
            text = self.before_answers(text) or text
        # Closed messages tell a turn from an answer that quotes "USER:". Prompts written by hand may not close them.
        spans = self._spans(text, closed=True) if self.closings else []
        if len(spans) < (1 if holds_answers else 2):
            spans = self._spans(text, closed=False)
        if (not spans or self.headless) and (answer := self.answer.search(text)):
            # The row begins inside a turn.
            begin = text.rfind(BARRIER, 0, answer.start()) + 1
            if not spans or answer.start() <= spans[0][0]:
                spans.insert(0, (begin, answer.start(), False))
        return [
            UserTurn(tuple(self._own_words(text, start, end)), text.startswith(BARRIER, end))
            for start, end, by_tool in spans
            if not by_tool
        ]

    def before_answers(self, text: str) -> str | None:
        """A conversation up to the header of its first answer, so that nothing an answer says is in it.

        None if the text doesn't show one: no user speaks before an assistant does, or nothing announces users.
        """
        start = None if self.headless else self.start.search(text)
        if start is None or start["tool"] is not None or self.answer_header.search(text, 0, start.start()):
            return None
        answer = self.answer.search(text, start.end())
        return text[: answer.end()] if answer else None

    def _spans(self, text: str, *, closed: bool) -> list[tuple[int, int, bool]]:
        """``(start, end, by a tool)``. ``closed``: later turns count only right after a closed message."""
        spans: list[tuple[int, int, bool]] = []
        position = 0
        while start := self.start.search(text, position):
            if closed and spans and not text.endswith(self.closings, 0, start.start()):
                position = start.start() + 1
                continue
            end = self.end.search(text, start.end())
            position = end.start() if end else len(text)
            # What closes the conversation may be what announces a turn.
            if start.end() < len(text):
                spans.append((start.end(), position, start["tool"] is not None))
        return spans

    def _own_words(self, text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
        if self.system is not None and text.startswith(self.system[0], start, end):
            closing = text.find(self.system[1], start + len(self.system[0]), end)
            start = start if closing < 0 else closing + len(self.system[1])
        if self.definitions is not None and text.startswith(self.definitions[0], start, end):
            start = skip_json(text, start + len(self.definitions[0]))
            start += len(self.definitions[1]) if text.startswith(self.definitions[1], start, end) else 0
        for medium in self.media.finditer(text, start, end) if self.media else ():
            if medium.start() > start:
                yield start, medium.start()
            start = medium.end()
        if end > start:
            yield start, end


def answer_headers(text: str) -> list[int]:
    """Where the headers of answers end in the text of a :class:`~.decoding.DecodedRow`, by whatever template."""
    marked = [place for place, letter in enumerate(text) if letter != SPECIAL]
    plain = text.replace(SPECIAL, "")
    return [marked[match.end() - 1] + 1 for match in _ANSWER_HEADER.finditer(plain)]


def skip_json(text: str, start: int) -> int:
    """Where the JSON objects and lists end that begin at ``start``."""
    while text.startswith(("{", "["), start):
        try:
            _, start = _JSON.raw_decode(text, start)
        except (JSONDecodeError, RecursionError):
            break
    return start
