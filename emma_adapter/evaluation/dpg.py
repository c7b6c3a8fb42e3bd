"""DPG-Bench's table of questions: a CSV line for each question, with the lines of a prompt together."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..messages import listed, shown

ITEM, PROMPT, NUMBER, PARENTS, QUESTION = (
    "item_id",
    "text",
    "proposition_id",
    "dependency",
    "question_natural_language",
)


def read_dpg(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place of each prompt, for messages, and its row: ``{"prompt", "item_id", "questions"}``.

    A question comes after those it depends on (``dependency``, 0 for none), and otherwise in the file's order.

    Raises:
        DataError: naming the line and what is wrong with it.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        try:
            columns = set(reader.fieldnames or ())
            lines = [(f"{path}, line {reader.line_num}", line) for line in reader]
        except csv.Error as error:
            raise DataError(
                f"{path}, line {reader.line_num} is not valid CSV: {error}; download or copy it again"
            ) from error
    if missing := sorted({ITEM, PROMPT, NUMBER, PARENTS, QUESTION} - columns):
        raise DataError(f"{path} has no column {listed(missing)}: a .csv file must be as DPG-Bench's dpg_bench.csv")
    for item, group in groupby(lines, key=lambda placed: placed[1][ITEM]):
        prompt_lines = list(group)
        where, first = prompt_lines[0]
        yield where, {"prompt": first[PROMPT], "item_id": item, "questions": _in_order(prompt_lines)}


def _in_order(lines: list[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return the questions of a prompt, each after its parents, which are given by their places from 1."""
    waiting: dict[int, tuple[str, dict[str, Any]]] = {}
    for where, line in lines:
        number = _number(where, line, NUMBER)
        if number in waiting:
            raise DataError(f"{where}: the prompt has two questions of {NUMBER!r} {number}; number them apart")
        waiting[number] = (where, line)
    parents = {number: _parents(where, line, waiting) for number, (where, line) in waiting.items()}
    places: dict[int, int] = {}
    questions = []
    while waiting:
        ready = next((number for number in waiting if all(parent in places for parent in parents[number])), None)
        if ready is None:
            where = next(iter(waiting.values()))[0]
            raise DataError(
                f"{where}: questions {listed(map(str, waiting))} depend on each other in a circle: break it"
            )
        _, line = waiting.pop(ready)
        places[ready] = len(places) + 1
        questions.append({"question": line[QUESTION], "after": [places[parent] for parent in parents[ready]]})
    return questions


def _parents(where: str, line: Mapping[str, Any], known: Mapping[int, Any]) -> list[int]:
    texts = str(line[PARENTS] or "0").split(",")
    parents = [_number(where, {PARENTS: text}, PARENTS) for text in texts]
    parents = [parent for parent in parents if parent]
    if unknown := [parent for parent in parents if parent not in known]:
        raise DataError(f"{where}: {PARENTS!r} names {unknown}, and the prompt has no such {NUMBER!r}: 0 is none")
    return parents


def _number(where: str, line: Mapping[str, Any], name: str) -> int:
    value = line[name]
    try:
        return int(value)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: {name!r} is {shown(value)}; it must be a whole number") from error
