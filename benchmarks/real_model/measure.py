"""Accuracy, and the adapter's overhead."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from emma_adapter.data.conversations import Message, count_images, trainable_turns
from emma_adapter.data.rows import Rows
from emma_adapter.models.prompts import Prompts


def questions(rows: Rows) -> list[tuple[int, int]]:
    """Row and turn of every answer before which an image was shown."""
    return [(row, turn) for row in range(len(rows)) for turn in trainable_turns(rows.messages(row))]


def prompt(processor: Any, rows: Rows, row: int, turn: int, device: torch.device) -> Any:
    """The inputs of ``generate`` for one answer, worded as in training."""
    messages = rows.messages(row)[:turn]
    return Prompts(processor).batch([messages], [rows.images(row)[: count_images(messages)]]).to(device)


@torch.no_grad()
def right_answers(model: nn.Module, processor: Any, rows: Rows, name: str) -> list[bool]:
    """Whether the greedy answer to each question is the one of the data, apart from case and punctuation."""
    model.eval()
    device = next(model.parameters()).device
    right = []
    for row, turn in tqdm(questions(rows), desc=name, mininterval=1):
        wanted = _text(rows.messages(row)[turn])
        inputs = prompt(processor, rows, row, turn, device)
        longest = len(processor.tokenizer(wanted)["input_ids"]) + 8
        out = model.generate(**inputs, max_new_tokens=longest, do_sample=False)  # type: ignore[operator]
        said = processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right.append(_plain(said) == _plain(wanted))
    return right


def overhead(call: Callable[[], object], disabled: Callable[[], Any], rounds: int) -> dict[str, float]:
    """Seconds of a call with the adapter, and its ratio to the same call without: pairs, one right after the other."""

    def timed() -> float:
        _wait()
        started = time.perf_counter()
        call()
        _wait()
        return time.perf_counter() - started

    pairs = []
    # The first round warms up.
    for number in range(rounds + 1):
        times: dict[bool, float] = {}
        # In turns, so that neither is always the one after a pause.
        for off in (False, True) if number % 2 else (True, False):
            if off:
                with disabled():
                    times[off] = timed()
            else:
                times[off] = timed()
        pairs.append((times[False], times[True]))
    measured = np.array(pairs[1:])
    ratios = measured[:, 0] / measured[:, 1]
    low, middle, high = np.percentile(ratios, [20, 50, 80])
    return {
        "seconds": float(np.median(measured[:, 0])),
        "ratio": float(middle),
        "ratio_20th": float(low),
        "ratio_80th": float(high),
    }


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _text(message: Message) -> str:
    return " ".join(part["text"] for part in message["content"] if part["type"] == "text")


def _plain(text: str) -> str:
    return " ".join(re.sub(r"[^\w\s]", " ", text.lower()).split())
