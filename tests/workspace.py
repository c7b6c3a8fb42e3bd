"""The folder that the documentation's examples run in: a model under its hub name, and a small dataset."""

from __future__ import annotations

import json
from pathlib import Path

import tiny

MODEL_ID = "llava-hf/llava-1.5-7b-hf"
_QUESTIONS = [
    ("How many dogs are there?", "two"),
    ("What colour is the bird?", "red"),
    ("Is there a cat in the picture?", "no"),
    ("What colour is the tree?", "green"),
]


def make_workspace(folder: Path) -> Path:
    """``llava-hf/llava-1.5-7b-hf/``, a tiny LLaVA with its processor; ``train.jsonl``, with pictures in ``images/``;
    ``birds/``, pictures with ``questions.jsonl``."""
    tiny.llava().save_pretrained(folder / MODEL_ID)
    tiny.processor().save_pretrained(folder / MODEL_ID)
    (folder / "images").mkdir()
    rows = []
    for number, (question, answer) in enumerate(_QUESTIONS * 2):
        tiny.picture(number).save(folder / "images" / f"{number}.png")
        messages = [tiny.user(question), tiny.assistant(answer)]
        rows.append({"images": [f"images/{number}.png"], "messages": messages})
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "birds").mkdir()
    questions = []
    for number in range(4):
        tiny.picture(number).save(folder / "birds" / f"{number}.png")
        for question, answer in _QUESTIONS[:2]:
            attribute = "colour" if "colour" in question else "count"
            row = {"image": f"{number}.png", "question": question, "answer": answer, "attribute": attribute}
            questions.append(row)
    (folder / "birds" / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    return folder
