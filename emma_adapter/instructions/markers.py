"""The markers that a chat template writes around user turns, and how a conversation is searched for them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from json import JSONDecodeError

from .decoding import BARRIER, SPECIAL

# What well-known templates write before an answer. Role words in plain text count only in the forms listed here.
_ANSWER_HEADER = re.compile(
    r"<\|im_start\|>assistant|<\|start\|>assistant(?:<\|message\|>)?|<\|assistant\|>|<\|CHATBOT_TOKEN\|>"
    r"|<\|start_header_id\|>assistant<\|end_header_id\|>|<\uff5cAssistant\uff5c>|<start_of_turn>model|<\|turn>model"
    r"|\[/INST\]|ASSISTANT:|Assistant:|###Response:"
)
_JSON = json.JSONDecoder(strict=False)


@dataclass(frozen=True)
class UserTurn:
    """A user's turn; ``parts`` are the ``(start, end)`` of the user's own words, empty if there are none."""

    parts: tuple[tuple[int, int], ...]
    #: True if an answer begins before the template closes the turn, perhaps as labels supervise the user's words.
    interrupted: bool


@dataclass(frozen=True)
class TurnMarkers:
    """The markers that a template writes around user turns, in the text of a :class:`~.decoding.DecodedRow`."""

    #: Text before a user's words; in the group ``tool`` if a tool's result follows that looks like a user turn.
    start: re.Pattern[str]
    #: Text after a user's words.
    end: re.Pattern[str]
    #: Text between a user's words and the answer.
    answer: re.Pattern[str]
    #: Text that announces an answer, whatever precedes it.
    answer_header: re.Pattern[str]
    #: Texts that close a message before the next user turn; empty if the template doesn't close answers.
    closings: tuple[str, ...]
    #: The texts around system text that the template writes into a user turn.
    system: tuple[str, str] | None
    #: The texts around tool definitions, which are JSON, that the template writes into a user turn.
    definitions: tuple[str, str] | None
    #: An image or video, with the words that the template writes for it.
    media: re.Pattern[str] | None
    #: True if nothing announces the first turn.
    headless: bool
    #: True if words such as "USER:" announce a turn, not a tag or special token: answers may well quote them.
    in_words: bool

    def user_turns(self, text: str, *, holds_answers: bool = False) -> list[UserTurn]:
        """Return the user turns of a conversation, in order. A ``BARRIER`` ends a turn.

        ``holds_answers``: the text includes answers, which may quote the template.
        """
        if holds_answers and self.in_words and not self.closings:
            # A later turn can't be told from an answer that quotes one.
            text = self.before_answers(text) or text
        # Where messages are closed, a turn can be told from an answer that quotes "USER:"; prompts written by hand may
        # not close them.
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
        """Return the conversation up to the header of its first answer, so that it holds no word of an answer.

        None if no such header is found: no user speaks before an assistant does, or nothing announces users.
        """
        start = None if self.headless else self.start.search(text)
        if start is None or start["tool"] is not None or self.answer_header.search(text, 0, start.start()):
            return None
        answer = self.answer.search(text, start.end())
        return text[: answer.end()] if answer else None

    def _spans(self, text: str, *, closed: bool) -> list[tuple[int, int, bool]]:
        """Return ``(start, end, by_tool)`` of each turn; ``closed``: later ones count only after a closed message."""
        spans: list[tuple[int, int, bool]] = []
        position = 0
        while start := self.start.search(text, position):
            if closed and spans and not text.endswith(self.closings, 0, start.start()):
                position = start.start() + 1
                continue
            end = self.end.search(text, start.end())
            position = end.start() if end else len(text)
            # The end of a conversation may look like the start of a turn.
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
    """Return where answer headers of any known template end in the text of a :class:`~.decoding.DecodedRow`."""
    positions = [position for position, character in enumerate(text) if character != SPECIAL]
    plain_text = text.replace(SPECIAL, "")
    return [positions[match.end() - 1] + 1 for match in _ANSWER_HEADER.finditer(plain_text)]


def skip_json(text: str, start: int) -> int:
    """Return where the JSON objects and lists that begin at ``start`` end."""
    while text.startswith(("{", "["), start):
        try:
            _, start = _JSON.raw_decode(text, start)
        except (JSONDecodeError, RecursionError):
            break
    return start
