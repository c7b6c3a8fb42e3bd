"""The questions of a report, and the choice of those it shows."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ..data.images import to_rgb

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Question:
    """A question about images. A report reads questions one by one, so that a sequence may open images on access."""

    #: The conversation up to the question, which is its last message: ``{"role": ..., "content": [parts]}`` each.
    messages: Sequence[Any]
    #: PIL images, as many as the messages show; stored upright, as their EXIF orientation says, and in RGB.
    images: Sequence[Any]
    #: The right answer.
    answer: str | None = None
    #: What is asked, in a few words that many questions share, such as ``"colour"``.
    attribute: str | None = None
    #: A name shared with exactly one other question, the same one about a near-identical image.
    pair: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "images", tuple(to_rgb(image) for image in self.images))

    @classmethod
    def about(cls, image: Any, text: str, **labels: str | None) -> Question:
        """Make the question ``text`` about one image."""
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
    """What a report keeps of a question: everything but its images."""

    #: Its place among the questions that were read.
    place: int
    text: str
    answer: str | None
    attribute: str | None
    pair: str | None
    #: A digest, equal for equal images.
    images: str


def entry_of(question: Question, place: int) -> Entry | None:
    """Return a question's entry; None if it shows no image."""
    if not question.images:
        return None
    digest = hashlib.sha256()
    for image in question.images:
        digest.update(repr((image.size, image.mode)).encode())
        digest.update(image.tobytes())
    return Entry(place, question.text, question.answer, question.attribute, question.pair, digest.hexdigest())


def spread(entries: Sequence[T], count: int) -> list[T]:
    """Return at most ``count`` entries, in order, spread evenly from the first to the last."""
    if len(entries) <= count or count < 2:
        return list(entries[:count])
    return [entries[round(number * (len(entries) - 1) / (count - 1))] for number in range(count)]


def choose(entries: Sequence[Entry], count: int) -> list[Entry]:
    """Return the questions to show, in order, whatever the model answers.

    There are as many of each attribute as of the others; without attributes, they are spread evenly.
    """
    if len(entries) <= count or count < 2:
        return spread(entries, count)
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.attribute or "", []).append(entry)
    if len(groups) == 1:
        return spread(entries, count)
    # Attributes take turns, and prefer images that aren't shown yet.
    chosen: list[Entry] = []
    shown_images: set[str] = set()
    queues = list(groups.values())
    while len(chosen) < count:
        for queue in queues:
            if queue and len(chosen) < count:
                choice = next((entry for entry in queue if entry.images not in shown_images), queue[0])
                queue.remove(choice)
                shown_images.add(choice.images)
                chosen.append(choice)
    return sorted(chosen, key=lambda entry: entry.place)


def find_twins(entries: Sequence[Entry], count: int) -> list[tuple[Entry, Entry]]:
    """Return at most ``count`` couples of questions with different words about the same image, one for each image."""
    first_entries: dict[str, Entry] = {}
    couples: dict[str, tuple[Entry, Entry]] = {}
    for entry in entries:
        first = first_entries.setdefault(entry.images, entry)
        if first.text != entry.text and entry.images not in couples:
            couples[entry.images] = (first, entry)
    return list(couples.values())[:count]


def find_pairs(entries: Sequence[Entry]) -> tuple[list[tuple[Entry, Entry]], int]:
    """Return the pairs of questions that share a name, and how many names aren't those of exactly two questions."""
    by_name: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.pair is not None:
            by_name.setdefault(entry.pair, []).append(entry)
    pairs = [(namesakes[0], namesakes[1]) for namesakes in by_name.values() if len(namesakes) == 2]
    return pairs, len(by_name) - len(pairs)


def normalised(answer: str) -> str:
    """Return an answer in the form that is compared, without case, extra white space and a final full stop."""
    return " ".join(answer.split()).casefold().removesuffix(".")
