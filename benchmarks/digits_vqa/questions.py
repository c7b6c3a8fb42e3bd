"""Questions with one-word answers on a scene, and pairs of scenes that differ in one attribute."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .scenes import COLOURS, DIGITS, EMPTY, GRID, POSITIONS, Scenes, pick_scans, sample_scenes

QUESTION_TYPES = (
    "digit at position",
    "colour at position",
    "colour of digit",
    "relation",
    "count of digit",
    "count of colour",
    "existence",
)
PAIR_TYPES = ("digit at position", "colour at position", "colour of digit", "existence")

_NEIGHBOURS = (("left of", 0, -1), ("right of", 0, 1), ("above", -1, 0), ("below", 1, 0))


@dataclass(frozen=True)
class Question:
    scene: int
    type: str
    text: str
    answer: str


def ask(type: str, digits: np.ndarray, colours: np.ndarray, rng: np.random.Generator) -> tuple[str, str] | None:
    """A question of this type and its answer, or None where the scene allows none.

    ``digits`` and ``colours`` are the ``[CELLS]`` attributes of one scene.
    """
    full = np.flatnonzero(digits != EMPTY)
    if type == "digit at position":
        cell = rng.choice(full)
        return f"what digit is at the {POSITIONS[cell]} ?", DIGITS[digits[cell]]
    if type == "colour at position":
        cell = rng.choice(full)
        return f"what colour is the digit at the {POSITIONS[cell]} ?", COLOURS[colours[cell]]
    if type == "colour of digit":
        unique = [cell for cell in full if (digits == digits[cell]).sum() == 1]
        if not unique:
            return None
        cell = unique[rng.integers(len(unique))]
        return f"what colour is the {DIGITS[digits[cell]]} ?", COLOURS[colours[cell]]
    if type == "relation":
        return _ask_relation(digits, colours, full, rng)
    if type == "count of digit":
        counts = np.bincount(digits[full], minlength=10)
        wanted = rng.integers(3)
        candidates = np.flatnonzero(counts == wanted if wanted < 2 else counts >= 2)
        digit = rng.choice(candidates if len(candidates) else np.arange(10))
        return f"how many digits are {DIGITS[digit]} ?", DIGITS[counts[digit]]
    if type == "count of colour":
        colour = rng.integers(len(COLOURS))
        return f"how many digits are {COLOURS[colour]} ?", DIGITS[int((colours[full] == colour).sum())]
    if type == "existence":
        return _ask_existence(digits, colours, full, rng)
    raise ValueError(f"unknown question type {type!r}; there are {QUESTION_TYPES}")


def _ask_relation(
    digits: np.ndarray, colours: np.ndarray, full: np.ndarray, rng: np.random.Generator
) -> tuple[str, str] | None:
    options = []
    for cell in full:
        if ((digits == digits[cell]) & (colours == colours[cell])).sum() != 1:
            continue
        row, column = divmod(int(cell), GRID)
        for words, down, right in _NEIGHBOURS:
            r, c = row + down, column + right
            if 0 <= r < GRID and 0 <= c < GRID and digits[r * GRID + c] != EMPTY:
                options.append((cell, words, r * GRID + c))
    if not options:
        return None
    cell, words, neighbour = options[rng.integers(len(options))]
    return f"what digit is {words} the {COLOURS[colours[cell]]} {DIGITS[digits[cell]]} ?", DIGITS[digits[neighbour]]


def _ask_existence(
    digits: np.ndarray, colours: np.ndarray, full: np.ndarray, rng: np.random.Generator
) -> tuple[str, str] | None:
    present = sorted({(digits[cell], colours[cell]) for cell in full})
    if rng.random() < 0.5:
        digit, colour = present[rng.integers(len(present))]
        return f"is there a {COLOURS[colour]} {DIGITS[digit]} ?", "yes"
    # Hard negatives: the digit and the colour both occur, but never together.
    absent = [
        (digit, colour)
        for digit in sorted(set(digits[full]))
        for colour in sorted(set(colours[full]))
        if (digit, colour) not in present
    ]
    if not absent:
        return None
    digit, colour = absent[rng.integers(len(absent))]
    return f"is there a {COLOURS[colour]} {DIGITS[digit]} ?", "no"


def ask_any(digits: np.ndarray, colours: np.ndarray, rng: np.random.Generator) -> tuple[str, str, str]:
    """(type, question, answer) of a random type that the scene allows."""
    while True:
        type = QUESTION_TYPES[rng.integers(len(QUESTION_TYPES))]
        if (asked := ask(type, digits, colours, rng)) is not None:
            return type, *asked


def caption(digits: np.ndarray, colours: np.ndarray) -> str:
    return " ".join(
        "empty" if d == EMPTY else f"{COLOURS[c]} {DIGITS[d]}" for d, c in zip(digits, colours, strict=True)
    )


def sample_questions(scenes: Scenes, per_scene: int, rng: np.random.Generator) -> list[Question]:
    return [
        Question(scene, *ask_any(scenes.digits[scene], scenes.colours[scene], rng))
        for scene in range(len(scenes))
        for _ in range(per_scene)
    ]


def every_question_type(scenes: Scenes, rng: np.random.Generator) -> list[Question]:
    """One question of each type for each scene that allows it."""
    questions = []
    for scene in range(len(scenes)):
        for type in QUESTION_TYPES:
            if (asked := ask(type, scenes.digits[scene], scenes.colours[scene], rng)) is not None:
                questions.append(Question(scene, type, *asked))
    return questions


def sample_pairs(
    n: int, split: str, rng: np.random.Generator
) -> tuple[Scenes, Scenes, list[tuple[Question, Question]]]:
    """Pairs in the manner of MMVP: two scenes that differ in one attribute of one digit, one question,
    two different answers. Both must be right for the pair to count.

    Scene ``i`` of the first and scene ``i`` of the second set of scenes belong together.
    """
    scenes = sample_scenes(n, split, rng)
    digits, colours = scenes.digits.copy(), scenes.colours.copy()
    pairs = []
    for i in range(n):
        type = PAIR_TYPES[i % len(PAIR_TYPES)]
        changed = None
        for _ in range(50):
            changed = _change_one_attribute(type, scenes.digits[i], scenes.colours[i], rng)
            if changed is not None:
                break
        if changed is None:
            continue
        digits[i], colours[i], text, first, second = changed
        pairs.append((Question(i, type, text, first), Question(i, type, text, second)))
    scans = scenes.scans.copy()
    redrawn = digits != scenes.digits
    scans[redrawn] = pick_scans(digits, split, rng)[redrawn]
    return scenes, scenes.with_attributes(digits, colours, scans), pairs


def _change_one_attribute(
    type: str, digits: np.ndarray, colours: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, str, str, str] | None:
    new_digits, new_colours = digits.copy(), colours.copy()
    cell = rng.choice(np.flatnonzero(digits != EMPTY))
    other_digit = (digits[cell] + rng.integers(1, 10)) % 10
    other_colour = (colours[cell] + rng.integers(1, len(COLOURS))) % len(COLOURS)
    if type == "digit at position":
        new_digits[cell] = other_digit
        text = f"what digit is at the {POSITIONS[cell]} ?"
        return new_digits, new_colours, text, DIGITS[digits[cell]], DIGITS[other_digit]
    if type == "colour at position":
        new_colours[cell] = other_colour
        text = f"what colour is the digit at the {POSITIONS[cell]} ?"
        return new_digits, new_colours, text, COLOURS[colours[cell]], COLOURS[other_colour]
    if type == "colour of digit":
        if (digits == digits[cell]).sum() != 1:
            return None
        new_colours[cell] = other_colour
        text = f"what colour is the {DIGITS[digits[cell]]} ?"
        return new_digits, new_colours, text, COLOURS[colours[cell]], COLOURS[other_colour]
    if ((digits == digits[cell]) & (colours == colours[cell])).sum() != 1:
        return None
    text = f"is there a {COLOURS[colours[cell]]} {DIGITS[digits[cell]]} ?"
    if rng.random() < 0.5:
        new_colours[cell] = other_colour
    else:
        new_digits[cell] = other_digit
    return new_digits, new_colours, text, "yes", "no"
