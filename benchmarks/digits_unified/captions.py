"""What is said of scenes: captions with and without places, questions, and instructions with their exact results."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..digits_vqa.scenes import COLOURS, DIGITS, EMPTY, pick_scans
from .scenes import COLUMNS, ROWS, SEEN, Scenes, with_cells

EDITS = ("recolour", "replace", "remove", "add", "move")

DRAW, DESCRIBE = "draw", "describe"

#: The words of all prompts and answers.
WORDS = (
    *DIGITS,
    *COLOURS,
    *dict.fromkeys(word for names in (ROWS, COLUMNS) for grid in names.values() for word in grid),
    *("empty", ",", "?", "what", "digit", "digits", "colour", "is", "are", "at", "the", "a", "how", "many", "there"),
    *("yes", "no", "an", DRAW, DESCRIBE, "then", "make", "replace", "with", "remove", "add", "move", "to"),
)


def position(cell: int, grid: int) -> str:
    row, column = divmod(int(cell), grid)
    return f"{ROWS[grid][row]} {COLUMNS[grid][column]}"


def caption(
    digits: np.ndarray, colours: np.ndarray, rng: np.random.Generator | None = None, places: bool = True
) -> str:
    """ "red five top left , empty top right , ..." of one scene's ``[cells]`` arrays, in random order if there is an
    ``rng``, else in reading order."""
    grid = round(len(digits) ** 0.5)
    order = np.arange(len(digits)) if rng is None else rng.permutation(len(digits))
    return " , ".join(
        ("empty" if digits[cell] == EMPTY else f"{COLOURS[colours[cell]]} {DIGITS[digits[cell]]}")
        + (f" {position(cell, grid)}" if places else "")
        for cell in order
    )


def question(digits: np.ndarray, colours: np.ndarray, rng: np.random.Generator) -> tuple[str, str]:
    """A question on one scene and its answer of one word."""
    grid = round(len(digits) ** 0.5)
    full = np.flatnonzero(digits != EMPTY)
    cell = rng.choice(full)
    kind = rng.integers(5)
    if kind == 0:
        return f"what digit is at the {position(cell, grid)} ?", DIGITS[digits[cell]]
    if kind == 1:
        return f"what colour is the digit at the {position(cell, grid)} ?", COLOURS[colours[cell]]
    if kind == 2 and (digits == digits[cell]).sum() == 1:
        return f"what colour is the {DIGITS[digits[cell]]} ?", COLOURS[colours[cell]]
    if kind == 3:
        colour = rng.integers(len(COLOURS))
        return f"how many digits are {COLOURS[colour]} ?", DIGITS[int((colours == colour).sum())]
    other = cell if rng.random() < 0.5 else rng.choice(full)
    there = ((digits == digits[cell]) & (colours == colours[other])).any()
    return f"is there a {COLOURS[colours[other]]} {DIGITS[digits[cell]]} ?", "yes" if there else "no"


@dataclass(frozen=True)
class Edits:
    """Scenes, an instruction for each, and what it makes of them, exactly."""

    before: Scenes
    after: Scenes
    instructions: list[str]
    kinds: np.ndarray  # [n] of EDITS
    changed: np.ndarray  # [n, cells] bool
    by_name: np.ndarray  # [n] bool: the digit is named ("the five"), not its place ("the digit at the top left")

    def __len__(self) -> int:
        return len(self.before)


def sample_edits(scenes: Scenes, split: str, rng: np.random.Generator, *, moves: float | None = None) -> Edits:
    """One instruction for each scene. Makes no combination of digit and colour that is held out.

    ``moves``: the share of moves where a cell is empty; None: as often as any other kind.
    """
    grid = scenes.grid
    digits, colours, scans, hands, inks = (
        getattr(scenes, name).copy() for name in ("digits", "colours", "scans", "hands", "inks")
    )
    instructions, kinds, by_name = [], [], []
    for i in range(len(scenes)):
        full, empty = np.flatnonzero(digits[i] != EMPTY), np.flatnonzero(digits[i] == EMPTY)
        unique = [cell for cell in full if (digits[i] == digits[i, cell]).sum() == 1]
        named = bool(unique) and rng.random() < 0.7
        cell = rng.choice(unique if named else full)
        digit, colour = digits[i, cell], colours[i, cell]
        name = DIGITS[digit] if named else f"digit at the {position(cell, grid)}"
        kind = EDITS[rng.integers(len(EDITS) if len(empty) else 3)]
        if moves is not None and len(empty):
            kind = "move" if rng.random() < moves else EDITS[rng.integers(4)]
        if kind == "recolour":
            colours[i, cell] = rng.choice(np.flatnonzero(SEEN[digit] & (np.arange(len(COLOURS)) != colour)))
            instructions.append(f"make the {name} {COLOURS[colours[i, cell]]}")
        elif kind == "replace":
            digits[i, cell] = rng.choice(np.flatnonzero(SEEN[:, colour] & (np.arange(len(DIGITS)) != digit)))
            thing = DIGITS[digits[i, cell]]
            instructions.append(f"replace the {name} with {'an' if thing == 'eight' else 'a'} {thing}")
            scans[i, cell] = pick_scans(digits[i, [cell]], split, rng)[0]
        elif kind == "remove":
            digits[i, cell] = colours[i, cell] = EMPTY
            instructions.append(f"remove the {name}")
        elif kind == "add":
            cell, named = rng.choice(empty), False
            digits[i, cell], colours[i, cell] = np.argwhere(SEEN)[rng.integers(SEEN.sum())]
            scans[i, cell] = pick_scans(digits[i, [cell]], split, rng)[0]
            thing = f"{COLOURS[colours[i, cell]]} {DIGITS[digits[i, cell]]}"
            instructions.append(f"add a {thing} at the {position(cell, grid)}")
        else:
            target = rng.choice(empty)
            for field in (digits, colours, scans, hands, inks):
                field[i, target] = field[i, cell]
            digits[i, cell] = colours[i, cell] = EMPTY
            instructions.append(f"move the {name} to the {position(target, grid)}")
        kinds.append(kind)
        by_name.append(named)
    after = with_cells(scenes, digits=digits, colours=colours, scans=scans, hands=hands, inks=inks)
    changed = (digits != scenes.digits) | (colours != scenes.colours)
    return Edits(scenes, after, instructions, np.array(kinds), changed, np.array(by_name))
