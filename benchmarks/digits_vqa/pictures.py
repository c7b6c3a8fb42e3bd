"""Pictures of what the adapter did: answers before and after, and which visual tokens a question moved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor
from transformers import LlavaProcessor

from emma_adapter import EmmaAdapter

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


def draw_movement(
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
    """For each scene and question, how far each visual token moved, relative to its length."""
    figure, axes = plt.subplots(
        len(scenes), len(questions) + 1, figsize=(3 * len(questions) + 3, 3 * len(scenes)), layout="constrained"
    )
    maps = [[visual_token_movement(adapter, data, processor, scene, text) for text in questions] for scene in scenes]
    top = max(float(m.max()) for row in maps for m in row)
    image: Any = None
    for row, scene in enumerate(scenes):
        axes[row, 0].imshow(data.pictures[scene], interpolation="nearest")
        for column, text in enumerate(questions, start=1):
            axes[row, column].imshow(data.pictures[scene].mean(axis=-1), cmap="gray", interpolation="nearest")
            height, width = data.pictures.shape[1:3]
            image = axes[row, column].imshow(
                maps[row][column - 1].numpy(),
                extent=(-0.5, width - 0.5, height - 0.5, -0.5),
                cmap="viridis",
                alpha=0.7,
                vmin=0,
                vmax=top,
                interpolation="nearest",
            )
            if row == 0:
                axes[row, column].set_title(_as_written(text, 24), fontsize=11)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    figure.colorbar(image, ax=axes, shrink=0.6, label="movement of a visual token / its length")
    figure.savefig(path, dpi=110)
    plt.close(figure)


@torch.no_grad()
def visual_token_movement(
    adapter: EmmaAdapter, data: QuestionSet, processor: LlavaProcessor, scene: int, question: str
) -> Tensor:
    """``|V' - V| / |V|`` of each visual token, on the image's grid ``[height, width]``."""
    seen: list[Tensor] = []
    handle = adapter.alignment.register_forward_hook(lambda module, args, output: seen.extend((args[0], output)))
    talk: list[Any] = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    prompt = processor.apply_chat_template(talk, add_generation_prompt=True)
    encoded = processor.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    try:
        adapter.model(**encoded, pixel_values=data.pixel_values[scene : scene + 1])
    finally:
        handle.remove()
    original, aligned = (tokens[0] for tokens in seen)
    movement = (aligned - original).norm(dim=-1) / original.norm(dim=-1)
    return movement.reshape(math.isqrt(len(movement)), -1)


def _as_written(text: str, width: int) -> str:
    return fill(text.replace(" ?", "?"), width)
