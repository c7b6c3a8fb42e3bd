"""Scores from a vision-language model's answers about a picture: yes and no, or marks from 0 to 10."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any


def share_of_yes(questions: Sequence[Mapping[str, Any]], answers: Sequence[bool]) -> float:
    """Return the share of questions that hold, as DPG-Bench counts (arXiv 2403.05135).

    A question whose parent doesn't hold doesn't hold either, whatever was answered; nor do its descendants.

    Args:
        questions: each with the numbers of its parents in ``after``, from 1; parents come first.
        answers: whether the answer was yes.
    """
    holds: list[bool] = []
    for question, answer in zip(questions, answers, strict=True):
        holds.append(answer and all(holds[parent - 1] for parent in question.get("after", [])))
    return sum(holds) / len(holds)


def read_marks(text: str, count: int = 2) -> list[float] | None:
    """Return the marks in an answer ``{"score": [8, 7], "reasoning": "..."}``; None if it can't be read.

    It must be JSON and nothing else, perhaps fenced as a code block, with ``count`` numbers from 0 to 10.
    """
    text = text.strip()
    if text.startswith("```") and text.endswith("```"):
        text = text[3:-3].removeprefix("json")
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError):
        return None
    marks = answer.get("score") if isinstance(answer, dict) else None
    if not isinstance(marks, list) or len(marks) != count:
        return None
    if not all(isinstance(mark, (int, float)) and not isinstance(mark, bool) and 0 <= mark <= 10 for mark in marks):
        return None
    return [float(mark) for mark in marks]


def edit_scores(consistency: Sequence[float] | None, quality: Sequence[float] | None) -> dict[str, float | None]:
    """Return the scores of an edit, as VIEScore (arXiv 2312.14867) and GEdit-Bench (arXiv 2504.17761) combine marks.

    Semantic consistency is the lowest of its marks, perceptual quality likewise, and the overall score is the square
    root of their product; None where marks couldn't be read.
    """
    semantic = None if consistency is None else min(consistency)
    perceptual = None if quality is None else min(quality)
    overall = None if semantic is None or perceptual is None else math.sqrt(semantic * perceptual)
    return {"semantic consistency": semantic, "perceptual quality": perceptual, "edits": overall}
