"""Scoring of pictures by judges."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..data.images import open_image
from .answers import edit_scores, read_marks, share_of_yes
from .objects import Found, judge_objects, kept
from .pictures import opened, pictures_of
from .summary import Score
from .tasks import Task


class Judge(Protocol):
    """A vision-language model that answers questions; see :class:`~.judges.VisionLanguageJudge`."""

    def says_yes(self, picture: Any, question: str) -> bool: ...

    def consistency(self, sources: Sequence[Any], picture: Any, instruction: str) -> str: ...

    def quality(self, picture: Any) -> str: ...


@dataclass(frozen=True)
class Judges:
    """The judges, and the confidence that a detector needs. Rows whose judge is None aren't judged."""

    detector: Callable[[Any, Sequence[str], float], dict[str, list[Found]]] | None = None
    colours: Callable[[Any, str, Sequence[Found]], list[str]] | None = None
    asked: Judge | None = None
    threshold: float = 0.3
    counting_threshold: float = 0.3
    max_overlap: float = 0.7

    def can_judge(self, task: Task) -> bool:
        """Return whether a row's pictures can be judged."""
        if task.kind == "objects":
            return self.detector is not None and (self.colours is not None or not needs_colours(task))
        return task.kind in ("questions", "edits") and self.asked is not None


def needs_colours(task: Task) -> bool:
    """Return whether a row asks for the colour of an object."""
    return task.kind == "objects" and any("color" in clause for clause in task.row["include"])


def score(tasks: Sequence[Task], folder: Path, images: Path, judges: Judges) -> Iterator[Score]:
    """Yield the scores of the pictures of the rows that can be judged.

    Args:
        tasks: the rows.
        folder: of the pictures.
        images: the folder that names of images to edit are relative to.
        judges: of the pictures.

    Raises:
        DataError: if a row has no picture, or one can't be opened.
    """
    # Before anything is judged, so that a missing picture is noticed at once.
    task_paths = [(task, pictures_of(task, folder)) for task in tasks if judges.can_judge(task)]
    for task, paths in task_paths:
        for path in paths:
            [picture] = opened([path])
            for measure, (value, reason) in _measures(task, picture, images, judges).items():
                yield Score(task.number, path.relative_to(folder).as_posix(), task.tag, measure, value, reason)


def _measures(task: Task, picture: Any, images: Path, judges: Judges) -> dict[str, tuple[float | None, Any]]:
    if task.kind == "objects":
        wrong = _wrong_objects(task, picture, judges)
        return {"objects": (float(not wrong), wrong)}
    assert judges.asked is not None
    if task.kind == "questions":
        questions = task.row["questions"]
        holds = [judges.asked.says_yes(picture, question["question"]) for question in questions]
        return {"questions": (share_of_yes(questions, holds), holds)}
    sources = [open_image(name, images, task.where) for name in task.images]
    answers = [judges.asked.consistency(sources, picture, task.prompt), judges.asked.quality(picture)]
    return {name: (value, answers) for name, value in edit_scores(*map(read_marks, answers)).items()}


def _wrong_objects(task: Task, picture: Any, judges: Judges) -> list[str]:
    assert judges.detector is not None
    clauses = [*task.row["include"], *task.row.get("exclude", [])]
    threshold = judges.counting_threshold if task.tag == "counting" else judges.threshold
    detections = judges.detector(picture, list(dict.fromkeys(clause["class"] for clause in clauses)), threshold)
    objects = {
        name: kept(each, threshold=threshold, max_overlap=judges.max_overlap) for name, each in detections.items()
    }

    def colours_of(name: str, objects_of_class: Sequence[Found]) -> list[str]:
        assert judges.colours is not None
        return judges.colours(picture, name, objects_of_class)

    return judge_objects(task.row, objects, colours_of)
