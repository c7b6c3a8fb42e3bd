"""The markers of user turns, read from a processor's own chat template.

The template renders conversations of different shapes whose messages are sentinels. The text between the sentinels is
what the template itself writes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from .decoding import BARRIER, SPECIAL, TokenTexts
from .markers import TurnMarkers, skip_json

Message = dict[str, Any]
# Whole tags, so that <s> and </s> don't have "s>" in common.
_TAG_OR_CHARACTER = re.compile(r"<[^<>]*>|\[[^\[\]]*\]|.", re.DOTALL)
# The number of the system message's sentinel.
_SYSTEM = 3
# The roles whose content is a list of parts, not a string.
_CONTENT_STYLES = (frozenset[str](), frozenset({"user"}), frozenset({"user", "assistant"}))
_CALLED = "zqtool"
_TOOL_CALL_ID = f"{_CALLED}xyz"  # nine letters, on which Mistral's templates insist
_TOOL: Message = {
    "type": "function",
    "function": {
        "name": _CALLED,
        "description": "",
        "parameters": {"type": "object", "properties": {}, "required": []},
    },
}


def read_markers(
    processor: Any, texts: TokenTexts | None = None, system_prompts: Sequence[str] = ()
) -> TurnMarkers | None:
    """Return the markers of the processor's or tokenizer's chat template, or None if neither tells turns apart.

    Args:
        processor: anything with ``apply_chat_template``.
        texts: of the tokens in which the markers will be searched; default: those of the tokenizer.
        system_prompts: known ones. If a template writes system text right before the user's words, with only white
            space in between, there is no other way to tell where it ends.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    texts = TokenTexts(tokenizer) if texts is None else texts
    sentinels = _sentinels(texts) if hasattr(processor, "apply_chat_template") else None
    if sentinels is None:
        return None
    for renderer in (processor,) if tokenizer is processor else (processor, tokenizer):
        # A template for strings may print lists, but one for lists finds nothing in a string.
        templates = (_Template(renderer, texts, parts, sentinels) for parts in _CONTENT_STYLES)
        template = next((template for template in templates if template.render(template.talk)), None)
        if template is not None and (markers := template.markers(system_prompts)) is not None:
            return markers
    return None


@dataclass(frozen=True)
class _Rendered:
    """The text around a conversation's sentinels, in the order in which the template writes them."""

    order: list[int]
    before: list[str]
    rest: str


class _Template:
    """A chat template, and the markers learned by rendering it."""

    def __init__(self, renderer: Any, texts: TokenTexts, parts: Collection[str], sentinels: Sequence[str]) -> None:
        self.renderer = renderer
        self.texts = texts
        self.parts = parts
        self.sentinels = sentinels
        self.talk = [self.says(role, i) for i, role in enumerate(("user", "assistant", "user", "assistant"))]

    def markers(self, system_prompts: Sequence[str]) -> TurnMarkers | None:
        answered, asked = self.render(self.talk), self.render(self.talk[:3])
        generating = self.render(self.talk[:3], add_generation_prompt=True)
        if answered is None or asked is None or generating is None:
            return None
        if answered.order != [0, 1, 2, 3] or asked.order != [0, 1, 2] or generating.order != [0, 1, 2]:
            return None
        first, to_answer, later, to_last_answer = answered.before
        answers = _nonempty(to_answer, to_last_answer, generating.rest)
        # The text that the template writes after an answer belongs to the answer: labels may supervise it.
        header = later.removeprefix(_common_prefix(later, answered.rest)) or later
        if not answers or not header:
            return None
        instructed = self._with_system()
        starts = _Starts(header, first)
        system = starts.learn_system(instructed)
        if header == answered.rest:
            starts.texts += [BARRIER, BARRIER + header]
        closing = _common_prefix(asked.rest, *answers, generating.rest)
        if closing and closing != asked.rest and len(_units(closing)[-1]) == 1:
            closing = ""  # The texts merely begin with the same letters; only a whole tag would close the turn.
        # Nobody can type a special token, so it marks a user's second message in a row as a turn of its own.
        ends = [closing] if closing else [*answers, *(text for text in starts.texts if SPECIAL in text)]
        for prompt in system_prompts:
            starts.learn_known_system(self._with_system(prompt))
        tools = self._tool_starts(starts.texts)
        return TurnMarkers(
            start=re.compile(f"(?P<tool>{_any_of(tools)})|(?:{_any_of(starts.texts)})"),
            end=re.compile(_any_of([*ends, BARRIER])),
            answer=re.compile(_any_of(answers)),
            answer_header=re.compile(_any_of(_nonempty(*(text.removeprefix(closing) for text in answers)))),
            closings=starts.closings(later, closing, instructed),
            system=system,
            definitions=self._definitions(starts.texts),
            media=self._media(first, to_answer),
            headless=not first,
            in_words=not any(SPECIAL in text or "<" in text or "[" in text for text in starts.texts),
        )

    def says(self, role: str, number: int, text: str | None = None, *, parts: bool | None = None) -> Message:
        """Return a message of ``text``, by default the sentinel of this number."""
        text = self.sentinels[number] if text is None else text
        as_parts = role in self.parts if parts is None else parts
        return {"role": role, "content": [{"type": "text", "text": text}] if as_parts else text}

    def render(self, talk: list[Message], sentinels: Iterable[int] | None = None, **options: Any) -> _Rendered | None:
        """Render a conversation; None if the template refuses it or leaves something out."""
        try:
            text = self.texts.of_text(self.renderer.apply_chat_template(talk, tokenize=False, **options))
        except Exception:  # noqa: BLE001 - a template is a program of the user's, and may raise anything
            return None
        squeezed = ["".join(sentinel.split()) for sentinel in self.sentinels]
        places = [(text.find(squeezed[i]), i) for i in (range(len(talk)) if sentinels is None else sentinels)]
        if any(place < 0 for place, _ in places):
            return None
        order, before, end = [], [], 0
        for place, number in sorted(places):
            order.append(number)
            before.append(text[end:place])
            end = place + len(squeezed[number])
        return _Rendered(order, before, text[end:])

    def _with_system(self, known_prompt: str | None = None) -> _Rendered | None:
        """Render the talk up to the second question after a system message: a sentinel, or ``known_prompt``."""
        for parts in (False, True):
            rendered = self.render(
                [self.says("system", _SYSTEM, known_prompt, parts=parts), *self.talk[:3]],
                (0, 1, 2) if known_prompt else (0, 1, 2, _SYSTEM),
                add_generation_prompt=True,
            )
            if rendered is not None:
                return rendered
        return None

    def _tool_starts(self, starts: Sequence[str]) -> list[str]:
        """Return the texts before tools' results that look like user turns."""
        tool_starts: set[str] = set()
        for calling in (*map(_tool_call, ({}, "{}")), self.says("assistant", 1)):
            for options in ({}, {"tools": [_TOOL]}):
                for parts in (False, True):
                    result = {**self.says("tool", 2, parts=parts), "name": _CALLED, "tool_call_id": _TOOL_CALL_ID}
                    rendered = self.render([self.says("user", 0), calling, result], (0, 2), **options)
                    if rendered is not None and rendered.order == [0, 2]:
                        before = rendered.before[1]
                        start_index = max(before.rfind(start) for start in starts)
                        # The tool's name, and what follows it, differ for another tool.
                        text = before[max(start_index, 0) :].partition(_CALLED)[0]
                        tool_starts |= {text} - {*starts} if start_index >= 0 else set()
                        break
        return sorted(tool_starts)

    def _definitions(self, starts: Sequence[str]) -> tuple[str, str] | None:
        """Return the texts around tool definitions that are written into a user turn; None if there are none."""
        rendered = self.render(self.talk[:3], tools=[_TOOL])
        for number, before in zip(rendered.order, rendered.before, strict=True) if rendered is not None else ():
            words_index = max(before.rfind(start) + len(start) if start in before else -1 for start in starts)
            if number == 1 or words_index < 0:
                continue
            # At least one character further: a question that begins with a bracket must not be taken for a tool.
            for bracket in re.compile(r"[\[{]").finditer(before, words_index + 1):
                end = skip_json(before, bracket.start())
                if _CALLED in before[bracket.start() : end]:
                    return before[words_index : bracket.start()], before[end:]
        return None

    def _media(self, first: str, to_answer: str) -> re.Pattern[str] | None:
        """Return a pattern for what the template writes for an image or video, with any number where it counts them."""
        special = {text for token in self.texts.special_ids if (text := self.texts(token))}
        learned = set()
        for kind in ("image", "video"):
            content = [*self.says("user", 0, parts=True)["content"], {"type": kind}]
            content += self.says("user", 1, parts=True)["content"]
            rendered = self.render([{"role": "user", "content": content}, self.says("assistant", 2)], range(3))
            if rendered is None or rendered.order != [0, 1, 2]:
                continue
            before, between, after = rendered.before
            for text in (before.removeprefix(first), between, after.removesuffix(to_answer)):
                # Otherwise none of it is text, or the template joins parts and ignores media.
                words = text
                for token_text in special:
                    words = words.replace(token_text, "")
                if words and words != text:
                    learned.add(re.sub(r"\d+", r"\\d+", re.escape(text)))
        return re.compile("|".join(sorted(learned))) if learned else None


class _Starts:
    """Texts that precede a user's words, learned from rendered conversations."""

    def __init__(self, header: str, first: str) -> None:
        if first and header.endswith(first):
            self.texts = [first]
        else:
            self.texts = [header]
            self.learn(first)

    def learn(self, before: str) -> None:
        """Learn from ``before``, all text between the previous message, if any, and a user's words."""
        if any(before.endswith(start) for start in self.texts):
            return
        # The template writes more after its header, such as a default system message.
        start_index = max(before.rfind(start) for start in self.texts)
        if text := before[max(start_index, 0) :]:
            self.texts.append(text)

    def learn_system(self, instructed: _Rendered | None) -> tuple[str, str] | None:
        """Return the texts around a system message that is written into a user turn; None for one outside."""
        if instructed is None:
            return None
        position = instructed.order.index(_SYSTEM)
        if instructed.order[position + 1 : position + 2] not in ([0], [2]):
            return None
        opening, closing = instructed.before[position : position + 2]
        headers = [opening.rfind(start) + len(start) for start in self.texts if start in opening]
        if not headers or any(closing.endswith(start) for start in self.texts):
            self.learn(closing)
            return None
        return (opening[max(headers) :], closing) if closing else None

    def learn_known_system(self, instructed: _Rendered | None) -> None:
        for number, before in zip(instructed.order, instructed.before, strict=True) if instructed is not None else ():
            if number in (0, 2):
                self.learn(before)

    def closings(self, later: str, question: str, instructed: _Rendered | None) -> tuple[str, ...]:
        """Return texts before a later turn's header; none if answers aren't closed. ``question``: what closes one."""
        header = max((start for start in self.texts if later.endswith(start)), key=len, default=later)
        before = later.removesuffix(header)
        if not before:
            return ()
        texts = {before, question, BARRIER}
        if instructed is not None:
            texts |= {text.removesuffix(header) for text in instructed.before if text.endswith(header)}
        return tuple(sorted(texts - {""}))


def _sentinels(texts: TokenTexts) -> list[str] | None:
    """Return stand-ins for messages, which the tokenizer keeps and no template writes; None if there are none."""
    # Letters and digits, which a tokenizer that knows all characters doesn't change; without spaces.
    sentinels = [f"zqemma{number}qz" for number in range(_SYSTEM + 1)]
    if all(texts.of_text(text) == text for text in sentinels):
        return sentinels
    # A vocabulary of whole words lacks these: take words of its own, each three times in a row.
    words: list[str] = []
    for word in sorted(texts.vocabulary(), key=lambda word: (-len(word), word)):
        if word.isalnum() and texts.of_text(word) == word and not any(word in longer for longer in words):
            words.append(word)
        if len(words) == len(sentinels):
            return [" ".join([word] * 3) for word in words]
    return None


def _tool_call(arguments: Any) -> Message:
    function = {"name": _CALLED, "arguments": arguments}
    call = {"type": "function", "id": _TOOL_CALL_ID, "function": function}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def _nonempty(*texts: str) -> list[str]:
    return list(dict.fromkeys(filter(None, texts)))


def _any_of(texts: Sequence[str]) -> str:
    """Return a pattern for the longest of ``texts``; one that matches nothing if there are none."""
    return "|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) or r"(?!)"


def _units(text: str) -> list[str]:
    return _TAG_OR_CHARACTER.findall(text)


def _common_prefix(*texts: str) -> str:
    together = zip(*map(_units, texts), strict=False)
    return "".join(units[0] for units in takewhile(lambda units: len({*units}) == 1, together))
