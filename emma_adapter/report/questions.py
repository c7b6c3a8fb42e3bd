"""The questions of a report, and which of them are shown."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ..data.images import to_rgb

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Question:
    """A question about images. A report reads them one by one: a sequence may open images as it is asked."""

    #: The conversation up to the question, which is its last message: ``{"role": ..., "content": [parts]}`` each.
    messages: Sequence[Any]
    #: PIL images, as many as the messages show; kept upright, as their EXIF orientation says, and in RGB.
    images: Sequence[Any]
    #: The right answer.
    answer: str | None = None
    #: What is asked, in few words that many questions share: ``"colour"``.
    attribute: str | None = None
    #: A name that it shares with one other question: the same, about a near-identical image.
    pair: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "images", tuple(to_rgb(image) for image in self.images))

    @classmethod
    def about(cls, image: Any, text: str, **labels: str | None) -> Question:
        """The question ``text`` about one image."""
        return cls(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}], [image], **labels
        )

    @property
    def text(self) -> str:
        """The words of the last message."""
        parts = self.messages[-1]["content"]
        return "\n".join(part["text"] for part in parts if part["type"] == "text").strip()


@dataclass(frozen=True)
class Entry:
    """What a report remembers of a question: everything but its images."""

    #: Its place among the questions that were read.
    place: int
    text: str
    answer: str | None
    attribute: str | None
    pair: str | None
    #: Equal for equal images.
    images: str


def entry_of(question: Question, place: int) -> Entry | None:
    """None if the question shows no image."""
    if not question.images:
        return None
    digest = hashlib.sha256()
    for image in question.images:
        digest.update(repr((image.size, image.mode)).encode())
        digest.update(image.tobytes())
    return Entry(place, question.text, question.answer, question.attribute, question.pair, digest.hexdigest())


def spread(entries: Sequence[T], count: int) -> list[T]:
    """So many of them, in order, spread evenly from the first to the last."""
    if len(entries) <= count or count < 2:
        return list(entries[:count])
    return [entries[round(number * (len(entries) - 1) / (count - 1))] for number in range(count)]


def choose(entries: Sequence[Entry], count: int) -> list[Entry]:
    """The questions to show, in order: as many of each attribute as of the others, else spread evenly. What the model
    answers has no say."""
    if len(entries) <= count or count < 2:
        return spread(entries, count)
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.attribute or "", []).append(entry)
    if len(groups) == 1:
        return spread(entries, count)
    # In turn from each attribute, with images that aren't shown yet where there are any.
    chosen: list[Entry] = []
    seen: set[str] = set()
    queues = list(groups.values())
    while len(chosen) < count:
        for queue in queues:
            if queue and len(chosen) < count:
                taken = next((entry for entry in queue if entry.images not in seen), queue[0])
                queue.remove(taken)
                seen.add(taken.images)
                chosen.append(taken)
    return sorted(chosen, key=lambda entry: entry.place)


def find_twins(entries: Sequence[Entry], count: int) -> list[tuple[Entry, Entry]]:
    """Questions with different words about the same image, one couple an image."""
    first: dict[str, Entry] = {}
    found: dict[str, tuple[Entry, Entry]] = {}
    for entry in entries:
        other = first.setdefault(entry.images, entry)
        if other.text != entry.text and entry.images not in found:
            found[entry.images] = (other, entry)
    return list(found.values())[:count]


def find_pairs(entries: Sequence[Entry]) -> tuple[list[tuple[Entry, Entry]], int]:
    """Pairs by name, and how many names are not those of two questions."""
    named: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.pair is not None:
            named.setdefault(entry.pair, []).append(entry)
    pairs = [(own[0], own[1]) for own in named.values() if len(own) == 2]
    return pairs, len(named) - len(pairs)


def normalised(answer: str) -> str:
    """An answer as it is compared: case, white space and a final full stop make no difference."""
    return " ".join(answer.split()).casefold().removesuffix(".")
