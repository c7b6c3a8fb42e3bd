"""Questions that are shown: what the model answers, and where the adapter acts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch

from ..adapter.handle import EmmaAdapter
from ..analysis import TokenMap, compare, token_movement
from ..analysis.observing import in_eval_mode
from ..models.prompts import Prompts
from .contents import Answers, Example, Twins, View
from .pictures import encoded_pictures
from .questions import Question


def explain(adapter: EmmaAdapter, prompts: Prompts, question: Question, number: int, max_new_tokens: int) -> Example:
    """One question: its answers and its maps."""
    inputs = prompts.batch([question.messages], [question.images])
    return Example(
        number=number,
        question=question.text,
        answers=_answers(adapter, prompts, inputs, question.answer, max_new_tokens),
        images=tuple(question.images),
        views=tuple(_views(token_movement(adapter, inputs), inputs, question.images, prompts.processor)),
    )


def explain_twins(
    adapter: EmmaAdapter, prompts: Prompts, both: Sequence[Question], numbers: tuple[int, int], max_new_tokens: int
) -> Twins:
    """Two questions about one image."""
    inputs = [prompts.batch([question.messages], [question.images]) for question in both]
    answers = [
        _answers(adapter, prompts, own, question.answer, max_new_tokens)
        for own, question in zip(inputs, both, strict=True)
    ]
    texts = (both[0].text, both[1].text)
    compared = compare(adapter, inputs[0], [texts[0]], [texts[1]])
    views = _views([one.first for one in compared], inputs[0], both[0].images, prompts.processor)
    return Twins(numbers, texts, (answers[0], answers[1]), views[0].picture, compared[0])


def _answers(adapter: EmmaAdapter, prompts: Prompts, inputs: Any, expected: str | None, max_new_tokens: int) -> Answers:
    with_adapter = _generate(adapter, prompts, inputs, max_new_tokens)
    with adapter.disable_adapter():
        without = _generate(adapter, prompts, inputs, max_new_tokens)
    return Answers(with_adapter, without, expected)


def _generate(adapter: EmmaAdapter, prompts: Prompts, inputs: Any, max_new_tokens: int) -> str:
    model: Any = adapter.model
    given = inputs.to(next(model.parameters()).device)
    with torch.no_grad(), in_eval_mode(model):
        ids = model.generate(**given, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
    new = ids[0, given["input_ids"].shape[1] :]
    return str(prompts.processor.tokenizer.decode(new, skip_special_tokens=True)).strip()


def _views(maps: Sequence[TokenMap], inputs: Mapping[str, Any], images: Sequence[Any], processor: Any) -> list[View]:
    """One for each image where its tiles are known to lie; else one for each tile."""
    pictures = encoded_pictures(inputs, processor)
    # Where every entry has a picture of its own, and they are in the same order.
    own = dict(zip(map(id, maps), pictures, strict=True)) if len(pictures) == len(maps) else {}
    found: list[View] = []
    for medium, entries in groupby(maps, key=lambda one: one.medium):
        tiles = list(entries)
        placed = all(one.box is not None and one.norm.ndim == 2 for one in tiles)
        if placed and len(tiles) > 1:
            found.append(View(f"image {medium + 1}", _named(images, medium), tuple(tiles)))
            continue
        for one in tiles:
            picture = own.get(id(one)) or (_named(images, medium) if placed else None)
            # Some families take each tile for an image of its own.
            kind = "image" if len(maps) == len(images) else "tile"
            found.append(View(f"{kind} {len(found) + 1}", picture, (one,)))
    return found


def _named(images: Sequence[Any], number: int) -> Any:
    return images[number] if number < len(images) else None
