"""Prompts to draw, and what their pictures should show, from JSON lines or DPG-Bench's table."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.images import check_image
from ..errors import DataError
from ..messages import shown
from .dpg import read_dpg

#: The colours that GenEval asks for.
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
POSITIONS = ("left of", "right of", "above", "below")
_HINT = 'rows are {"prompt": ...} with "include" (objects), "questions", or "image" (edits)'


@dataclass(frozen=True)
class Task:
    """A row of a file of prompts.

    Attributes:
        number: of the row, from 0.
        where: its place, for messages.
        prompt: what to draw, or what to change.
        kind: what is judged: ``"objects"``, ``"questions"``, ``"edits"``, or ``"nothing"``.
        tag: the group that its score belongs to; may be empty.
        images: names of the files of pictures to edit.
        row: as it was read.
    """

    number: int
    where: str
    prompt: str
    kind: str
    tag: str
    images: tuple[str, ...]
    row: Mapping[str, Any]


def read_tasks(path: Path, image_folder: Path | None = None) -> list[Task]:
    """Read the rows of a ``.jsonl`` file, or of DPG-Bench's ``.csv``, and check them and their images.

    Args:
        path: the file.
        image_folder: the folder that names of images are relative to; default: the file's folder.

    Raises:
        DataError: naming the line and what is wrong with it.
    """
    folder = path.parent if image_folder is None else image_folder
    try:
        placed_rows = list(read_dpg(path) if path.suffix.lower() == ".csv" else _read_lines(path))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: save it as UTF-8 ({error})") from error
    if not placed_rows:
        raise DataError(f"{path} holds no rows; {_HINT}")
    tasks = [_task(number, where, row) for number, (where, row) in enumerate(placed_rows)]
    for task in tasks:
        for image in task.images:
            check_image(image, folder, task.where)
    return tasks


def _read_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the place of each row, for messages, and its contents."""
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where} is not valid JSON: {error}; one row a line") from error


def _task(number: int, where: str, row: Any) -> Task:
    if not isinstance(row, dict):
        raise DataError(f"{where} is a {type(row).__name__} and should be a JSON object; {_HINT}")
    prompt = row.get("instruction", row.get("prompt"))
    if not isinstance(prompt, str) or not prompt.strip():
        raise DataError(f'{where} has no "prompt" to draw: give it one; {_HINT}')
    tag = row.get("tag", "")
    if not isinstance(tag, str):
        raise DataError(f'{where}: "tag" is {shown(tag)}; it must be a text')
    judged = [name for name in ("include", "questions", "image") if name in row]
    if len(judged) > 1:
        raise DataError(f"{where} has {' and '.join(judged)}, which are judged differently: make a row of each")
    images: tuple[str, ...] = ()
    if judged == ["include"]:
        _check_objects(row, where)
    elif judged == ["questions"]:
        _check_questions(row["questions"], where)
    elif judged:
        names = row["image"] if isinstance(row["image"], list) else [row["image"]]
        if not names or not all(isinstance(name, str) and name for name in names):
            raise DataError(f'{where}: "image" is {shown(row["image"])}; give the name of a file, or a list of them')
        images = tuple(names)
    kind = {"include": "objects", "questions": "questions", "image": "edits"}[judged[0]] if judged else "nothing"
    return Task(number, where, prompt, kind, tag, images, row)


def _check_objects(row: Mapping[str, Any], where: str) -> None:
    """Check that a row is as GenEval's metadata: clauses with a class, a count, perhaps a colour and a position."""
    for name in ("include", "exclude"):
        clauses = row.get(name, [])
        if not isinstance(clauses, list) or not all(isinstance(clause, dict) for clause in clauses):
            raise DataError(f'{where}: "{name}" must be a list of {{"class": "dog", "count": 1}}')
        for number, clause in enumerate(clauses):
            count = clause.get("count")
            if not isinstance(clause.get("class"), str) or not clause["class"]:
                raise DataError(f'{where}: {name}[{number}] has no "class": name what is to be seen, as "dog"')
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise DataError(f'{where}: "count" of {name}[{number}] is {shown(count)}; give a whole number from 1')
            if clause.get("color", COLOURS[0]) not in COLOURS:
                raise DataError(
                    f'{where}: "color" of {name}[{number}] is {shown(clause["color"])}; known are {", ".join(COLOURS)}'
                )
            if "position" in clause and not _is_position(clause["position"], number):
                raise DataError(
                    f'{where}: "position" of {name}[{number}] is {shown(clause["position"])}; give one of '
                    f'{", ".join(POSITIONS)} and the number of an earlier clause, from 0, as ["left of", 0]'
                )


def _is_position(value: Any, before: int) -> bool:
    if not isinstance(value, list) or len(value) != 2 or value[0] not in POSITIONS:
        return False
    return isinstance(value[1], int) and not isinstance(value[1], bool) and 0 <= value[1] < before


def _check_questions(questions: Any, where: str) -> None:
    """Check that questions have a text, and that each depends on earlier ones only, which are numbered from 1."""
    if not isinstance(questions, list) or not questions:
        raise DataError(f'{where}: "questions" must be a list of {{"question": "...", "after": [1]}}')
    for number, question in enumerate(questions, 1):
        text = question.get("question") if isinstance(question, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise DataError(f'{where}: question {number} has no text: {{"question": "Is there a dog?"}}')
        after = question.get("after", [])
        whole = isinstance(after, list) and all(isinstance(each, int) and not isinstance(each, bool) for each in after)
        if not whole or not all(0 < each < number for each in after):
            raise DataError(
                f'{where}: "after" of question {number} is {shown(after)}; give a list of numbers of earlier '
                "questions, from 1"
            )
