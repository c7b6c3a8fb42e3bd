"""Where user turns begin and end, read off a processor's own chat template.

The template is rendered with sentinels for what is said, in conversations of different shapes. What stands between
the sentinels is what the template writes there itself.
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
# Which roles' content is a list of parts, not a string.
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
    """The markers of the processor's or tokenizer's chat template, or None if none tells turns apart.

    Args:
        processor: anything with ``apply_chat_template``.
        texts: of the tokens in which the markers will be searched.
        system_prompts: known ones. Templates that write system text right before the user's words, with only
            white space in between, leave no other way to tell where it ends.
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
    """A conversation around its sentinels, in the order in which the template writes them."""

    order: list[int]
    before: list[str]
    rest: str


class _Template:
    """A chat template, and what is learned by rendering it."""

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
        # What the template writes after an answer belongs to the answer: labels may supervise it.
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
            closing = ""  # Two words happen to begin alike; a whole tag would close the turn.
        # Nobody can type a special token, so that a user's second message in a row begins a turn of its own.
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
        """A message of ``text``, by default the sentinel of this number."""
        text = self.sentinels[number] if text is None else text
        as_parts = role in self.parts if parts is None else parts
        return {"role": role, "content": [{"type": "text", "text": text}] if as_parts else text}

    def render(self, talk: list[Message], sentinels: Iterable[int] | None = None, **options: Any) -> _Rendered | None:
        """None if the template refuses the conversation, or leaves something of it out."""
        try:
            text = self.texts.of_text(self.renderer.apply_chat_template(talk, tokenize=False, **options))
        except Exception:  # noqa: BLE001 - a template is a program of the user's; whatever it raises, it says nothing
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

    def _with_system(self, known: str | None = None) -> _Rendered | None:
        """The talk up to the second question, after a system message: its sentinel, or a known text."""
        for parts in (False, True):
            rendered = self.render(
                [self.says("system", _SYSTEM, known, parts=parts), *self.talk[:3]],
                (0, 1, 2) if known else (0, 1, 2, _SYSTEM),
                add_generation_prompt=True,
            )
            if rendered is not None:
                return rendered
        return None

    def _tool_starts(self, starts: Sequence[str]) -> list[str]:
        """What precedes a tool's result where it looks like a user turn."""
        found: set[str] = set()
        for calling in (*map(_tool_call, ({}, "{}")), self.says("assistant", 1)):
            for options in ({}, {"tools": [_TOOL]}):
                for parts in (False, True):
                    result = {**self.says("tool", 2, parts=parts), "name": _CALLED, "tool_call_id": _TOOL_CALL_ID}
                    rendered = self.render([self.says("user", 0), calling, result], (0, 2), **options)
                    if rendered is not None and rendered.order == [0, 2]:
                        before = rendered.before[1]
                        at = max(before.rfind(start) for start in starts)
                        # What follows the tool's name is not the same for another tool.
                        text = before[max(at, 0) :].partition(_CALLED)[0]
                        found |= {text} - {*starts} if at >= 0 else set()
                        break
        return sorted(found)

    def _definitions(self, starts: Sequence[str]) -> tuple[str, str] | None:
        """The texts around the definitions of tools that are written into a user turn."""
        rendered = self.render(self.talk[:3], tools=[_TOOL])
        for number, before in zip(rendered.order, rendered.before, strict=True) if rendered is not None else ():
            at = max(before.rfind(start) + len(start) if start in before else -1 for start in starts)
            if number == 1 or at < 0:
                continue
            # At least one character further: else a question that begins with a bracket would be taken for a tool.
            for bracket in re.compile(r"[\[{]").finditer(before, at + 1):
                end = skip_json(before, bracket.start())
                if _CALLED in before[bracket.start() : end]:
                    return before[at : bracket.start()], before[end:]
        return None

    def _media(self, first: str, to_answer: str) -> re.Pattern[str] | None:
        """What the template writes for an image or a video, with any number where it counts them."""
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
                # Else nothing of it is text, or the template joins parts and ignores media.
                words = text
                for token_text in special:
                    words = words.replace(token_text, "")
                if words and words != text:
                    learned.add(re.sub(r"\d+", r"\\d+", re.escape(text)))
        return re.compile("|".join(sorted(learned))) if learned else None


class _Starts:
    """Texts before a user's words, as they are learned."""

    def __init__(self, header: str, first: str) -> None:
        if first and header.endswith(first):
            self.texts = [first]
        else:
            self.texts = [header]
            self.learn(first)

    def learn(self, before: str) -> None:
        """From all that stands between the message before, if any, and a user's words."""
        if any(before.endswith(start) for start in self.texts):
            return
        # After its header the template writes more, such as a default system message.
        at = max(before.rfind(start) for start in self.texts)
        if text := before[max(at, 0) :]:
            self.texts.append(text)

    def learn_system(self, instructed: _Rendered | None) -> tuple[str, str] | None:
        """The texts around a system message that is written into a user turn; None for one outside."""
        if instructed is None:
            return None
        at = instructed.order.index(_SYSTEM)
        if instructed.order[at + 1 : at + 2] not in ([0], [2]):
            return None
        opening, closing = instructed.before[at : at + 2]
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
        """What stands before the header of a later turn; none if answers aren't closed. ``question``: closes that."""
        header = max((start for start in self.texts if later.endswith(start)), key=len, default=later)
        before = later.removesuffix(header)
        if not before:
            return ()
        found = {before, question, BARRIER}
        if instructed is not None:
            found |= {text.removesuffix(header) for text in instructed.before if text.endswith(header)}
        return tuple(sorted(found - {""}))


def _sentinels(texts: TokenTexts) -> list[str] | None:
    """What stands for what is said: texts that the tokenizer keeps and no template writes; None if there are none."""
    # Letters and digits, which a tokenizer that knows all characters doesn't change; without spaces.
    made = [f"zqemma{number}qz" for number in range(_SYSTEM + 1)]
    if all(texts.of_text(text) == text for text in made):
        return made
    # A vocabulary of whole words, to which ours are unknown: its own, each said three times.
    words: list[str] = []
    for word in sorted(texts.vocabulary(), key=lambda word: (-len(word), word)):
        if word.isalnum() and texts.of_text(word) == word and not any(word in longer for longer in words):
            words.append(word)
        if len(words) == len(made):
            return [" ".join([word] * 3) for word in words]
    return None


def _tool_call(arguments: Any) -> Message:
    function = {"name": _CALLED, "arguments": arguments}
    call = {"type": "function", "id": _TOOL_CALL_ID, "function": function}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def _nonempty(*texts: str) -> list[str]:
    return list(dict.fromkeys(filter(None, texts)))


def _any_of(texts: Sequence[str]) -> str:
    """A pattern for the longest of ``texts``; for nothing if there are none."""
    return "|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) or r"(?!)"


def _units(text: str) -> list[str]:
    return _TAG_OR_CHARACTER.findall(text)


def _common_prefix(*texts: str) -> str:
    together = zip(*map(_units, texts), strict=False)
    return "".join(units[0] for units in takewhile(lambda units: len({*units}) == 1, together))
