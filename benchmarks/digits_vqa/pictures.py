"""Pictures of what the adapter did: answers before and after, and what became of each visual token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any, Literal

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from transformers import LlavaProcessor

from emma_adapter import EmmaAdapter
from emma_adapter.analysis import TokenMap, token_movement
from emma_adapter.analysis.plots import plot_map

from .runs import QuestionSet

_RIGHT, _WRONG = "#1a7f37", "#c1121f"


def draw_answers(data: QuestionSet, before: Sequence[str], after: Sequence[str], path: Path, *, seed: int = 0) -> None:
    """Two questions of each kind of outcome: fixed, right both times, wrong both times, and broken."""
    outcomes: dict[str, list[int]] = {"fixed": [], "right": [], "wrong": [], "broken": []}
    for i, question in enumerate(data.questions):
        was, now = before[i] == question.answer, after[i] == question.answer
        kind = {(False, True): "fixed", (True, True): "right", (False, False): "wrong", (True, False): "broken"}[
            was, now
        ]
        outcomes[kind].append(i)
    rng = np.random.default_rng(seed)
    chosen = [
        int(i)
        for kind, count in (("fixed", 4), ("right", 1), ("wrong", 2), ("broken", 1))
        for i in rng.permutation(outcomes[kind])[:count]
    ]
    figure, axes = plt.subplots(2, 4, figsize=(12, 8))
    figure.subplots_adjust(left=0.02, right=0.98, top=0.93, bottom=0.09, hspace=0.5, wspace=0.08)
    for axis in axes.flat:
        axis.axis("off")
    for axis, i in zip(axes.flat, chosen, strict=False):
        question = data.questions[i]
        axis.imshow(data.pictures[question.scene], interpolation="nearest")
        axis.set_title(_as_written(question.text, 30), fontsize=11)
        for line, (name, given) in enumerate((("before", before[i]), ("after", after[i]))):
            colour = _RIGHT if given == question.answer else _WRONG
            text = f"{name}: {given}" + ("" if given == question.answer else f"  (is: {question.answer})")
            axis.text(0.5, -0.07 - 0.09 * line, text, color=colour, fontsize=11, ha="center", transform=axis.transAxes)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_maps(
    adapter: EmmaAdapter,
    data: QuestionSet,
    processor: LlavaProcessor,
    path: Path,
    *,
    scenes: Sequence[int] = (0, 1, 2),
    questions: Sequence[str] = (
        "what digit is at the top left ?",
        "what digit is at the bottom right ?",
        "how many digits are red ?",
    ),
) -> None:
    """For each scene and question, what became of each visual token: how much longer ``modulation`` made it, which
    erases what isn't asked for; how far the other fusions moved it."""
    field: Literal["gain", "relative"] = "gain" if adapter.config.fusion == "modulation" else "relative"
    maps = [[_token_map(adapter, data, processor, scene, text) for text in questions] for scene in scenes]
    values = np.stack([getattr(one, field) for row in maps for one in row])
    limits = (float(values.min()), float(values.max()))
    figure, axes = plt.subplots(
        len(scenes), len(questions) + 1, figsize=(3.4 * len(questions) + 3, 3 * len(scenes)), layout="constrained"
    )
    for row, scene in enumerate(scenes):
        axes[row, 0].imshow(data.pictures[scene], interpolation="nearest")
        for column, text in enumerate(questions, start=1):
            plot_map(maps[row][column - 1], data.pictures[scene], field, axes[row, column], limits=limits)
            if row == 0:
                axes[row, column].set_title(_as_written(text, 24), fontsize=11)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _token_map(
    adapter: EmmaAdapter, data: QuestionSet, processor: LlavaProcessor, scene: int, question: str
) -> TokenMap:
    talk: list[Any] = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    prompt = processor.apply_chat_template(talk, add_generation_prompt=True)
    encoded = processor.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    [found] = token_movement(adapter, {**encoded, "pixel_values": data.pixel_values[scene : scene + 1]})
    return found


def _as_written(text: str, width: int) -> str:
    return fill(text.replace(" ?", "?"), width)
