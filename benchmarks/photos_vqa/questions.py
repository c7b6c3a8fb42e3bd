"""Questions with one-word answers on a scene, and pairs of scenes that differ in one cell."""

from __future__ import annotations

import numpy as np

from ..digits_vqa.questions import Question
from ..digits_vqa.scenes import COLOURS, DIGITS
from .scenes import CELLS, COLUMNS, EMPTY, GRID, KIND_NAMES, POSITIONS, ROWS, Scenes, sample_scenes

QUESTION_TYPES = (
    "kind at position",
    "ground at position",
    "ground of kind",
    "place of kind",
    "relation",
    "count of kind",
    "existence",
)
PAIR_TYPES = ("kind at position", "ground at position", "ground of kind", "existence")

_NEIGHBOURS = (("left of", 0, -1), ("right of", 0, 1), ("above", -1, 0), ("below", 1, 0))


def ask(type: str, kinds: np.ndarray, grounds: np.ndarray, rng: np.random.Generator) -> tuple[str, str] | None:
    """A question of this type and its answer, or None where the scene allows none.

    ``kinds`` and ``grounds`` are the ``[CELLS]`` attributes of one scene.
    """
    full = np.flatnonzero(kinds != EMPTY)
    unique = np.array([cell for cell in full if (kinds == kinds[cell]).sum() == 1], dtype=int)
    if type == "kind at position":
        cell = rng.choice(full)
        return _kind_at(cell), KIND_NAMES[kinds[cell]]
    if type == "ground at position":
        cell = int(rng.integers(CELLS))
        return _ground_at(cell), COLOURS[grounds[cell]]
    if type == "relation":
        return _ask_relation(kinds, unique, rng)
    if type == "count of kind":
        return _ask_count(kinds, full, rng)
    if type == "existence":
        present = np.unique(kinds[full])
        is_there = rng.random() < 0.5
        kind = rng.choice(present if is_there else np.setdiff1d(np.arange(len(KIND_NAMES)), present))
        return _is_there(kind), "yes" if is_there else "no"
    if type not in ("ground of kind", "place of kind"):
        raise ValueError(f"unknown question type {type!r}; there are {QUESTION_TYPES}")
    if not len(unique):
        return None
    cell = rng.choice(unique)
    if type == "ground of kind":
        return _ground_of(kinds[cell]), COLOURS[grounds[cell]]
    row, column = divmod(int(cell), GRID)
    if rng.random() < 0.5:
        return f"in what row is the {KIND_NAMES[kinds[cell]]} ?", ROWS[row]
    return f"in what column is the {KIND_NAMES[kinds[cell]]} ?", COLUMNS[column]


def _kind_at(cell: int) -> str:
    return f"what is at the {POSITIONS[cell]} ?"


def _ground_at(cell: int) -> str:
    return f"what colour is the ground at the {POSITIONS[cell]} ?"


def _ground_of(kind: int) -> str:
    return f"what colour is behind the {KIND_NAMES[kind]} ?"


def _is_there(kind: int) -> str:
    return f"is there a {KIND_NAMES[kind]} ?"


def _ask_relation(kinds: np.ndarray, unique: np.ndarray, rng: np.random.Generator) -> tuple[str, str] | None:
    options = []
    for cell in unique:
        row, column = divmod(int(cell), GRID)
        for words, down, right in _NEIGHBOURS:
            r, c = row + down, column + right
            if 0 <= r < GRID and 0 <= c < GRID and kinds[r * GRID + c] != EMPTY:
                options.append((cell, words, r * GRID + c))
    if not options:
        return None
    cell, words, neighbour = options[rng.integers(len(options))]
    return f"what is {words} the {KIND_NAMES[kinds[cell]]} ?", KIND_NAMES[kinds[neighbour]]


def _ask_count(kinds: np.ndarray, full: np.ndarray, rng: np.random.Generator) -> tuple[str, str]:
    counts = np.bincount(kinds[full], minlength=len(KIND_NAMES))
    wanted = rng.integers(3)
    candidates = np.flatnonzero(counts == wanted if wanted < 2 else counts >= 2)
    kind = rng.choice(candidates if len(candidates) else np.arange(len(KIND_NAMES)))
    return f"how many cells show a {KIND_NAMES[kind]} ?", DIGITS[counts[kind]]


def ask_any(kinds: np.ndarray, grounds: np.ndarray, rng: np.random.Generator) -> tuple[str, str, str]:
    """(type, question, answer) of a random type that the scene allows."""
    while True:
        type = QUESTION_TYPES[rng.integers(len(QUESTION_TYPES))]
        if (asked := ask(type, kinds, grounds, rng)) is not None:
            return type, *asked


def caption(kinds: np.ndarray, grounds: np.ndarray) -> str:
    """What each cell shows, in reading order."""
    shown = ("empty" if kind == EMPTY else KIND_NAMES[kind] for kind in kinds)
    return " ".join(f"{COLOURS[ground]} {kind}" for kind, ground in zip(shown, grounds, strict=True))


def sample_questions(scenes: Scenes, per_scene: int, rng: np.random.Generator) -> list[Question]:
    return [
        Question(scene, *ask_any(scenes.kinds[scene], scenes.grounds[scene], rng))
        for scene in range(len(scenes))
        for _ in range(per_scene)
    ]


def every_question_type(scenes: Scenes, rng: np.random.Generator) -> list[Question]:
    """One question of each type for each scene that allows it."""
    return [
        Question(scene, type, *asked)
        for scene in range(len(scenes))
        for type in QUESTION_TYPES
        if (asked := ask(type, scenes.kinds[scene], scenes.grounds[scene], rng)) is not None
    ]


def sample_pairs(n: int, rng: np.random.Generator) -> tuple[Scenes, Scenes, list[tuple[Question, Question]]]:
    """Pairs in the manner of MMVP: two scenes that differ in one cell, one question, two different answers. Both must
    be right for the pair to count.

    Scene ``i`` of the first and scene ``i`` of the second set of scenes belong together.
    """
    scenes = sample_scenes(n, rng)
    kinds, grounds = scenes.kinds.copy(), scenes.grounds.copy()
    pairs = []
    for i in range(n):
        type = PAIR_TYPES[i % len(PAIR_TYPES)]
        changed = _change_one_cell(type, scenes.kinds[i], scenes.grounds[i], rng)
        if changed is None:
            continue
        kinds[i], grounds[i], text, first, second = changed
        pairs.append((Question(i, type, text, first), Question(i, type, text, second)))
    return scenes, scenes.with_attributes(kinds, grounds), pairs


def _change_one_cell(
    type: str, kinds: np.ndarray, grounds: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, str, str, str] | None:
    new_kinds, new_grounds = kinds.copy(), grounds.copy()
    cells = np.flatnonzero(kinds != EMPTY)
    if type in ("ground of kind", "existence"):
        cells = cells[[(kinds == kinds[cell]).sum() == 1 for cell in cells]]
        if not len(cells):
            return None
    cell = rng.choice(cells)
    other_kind = (kinds[cell] + rng.integers(1, len(KIND_NAMES))) % len(KIND_NAMES)
    other_ground = (grounds[cell] + rng.integers(1, len(COLOURS))) % len(COLOURS)
    if type in ("ground at position", "ground of kind"):
        new_grounds[cell] = other_ground
        text = _ground_at(cell) if type == "ground at position" else _ground_of(kinds[cell])
        return new_kinds, new_grounds, text, COLOURS[grounds[cell]], COLOURS[other_ground]
    new_kinds[cell] = other_kind
    if type == "kind at position":
        return new_kinds, new_grounds, _kind_at(cell), KIND_NAMES[kinds[cell]], KIND_NAMES[other_kind]
    return new_kinds, new_grounds, _is_there(kinds[cell]), "yes", "no"
