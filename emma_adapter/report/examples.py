"""The questions that a report shows: the model's answers, and where the adapter acts."""

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
    """Compute the answers and the maps of one question."""
    inputs = prompts.batch([question.messages], [question.images])
    return Example(
        number=number,
        question=question.text,
        answers=_answers(adapter, prompts, inputs, question.answer, max_new_tokens),
        images=tuple(question.images),
        views=tuple(_views(token_movement(adapter, inputs), inputs, question.images, prompts.processor)),
    )


def explain_twins(
    adapter: EmmaAdapter, prompts: Prompts, couple: Sequence[Question], numbers: tuple[int, int], max_new_tokens: int
) -> Twins:
    """Compute the answers to two questions about one image, and compare their maps."""
    inputs = [prompts.batch([question.messages], [question.images]) for question in couple]
    answers = [
        _answers(adapter, prompts, batch, question.answer, max_new_tokens)
        for batch, question in zip(inputs, couple, strict=True)
    ]
    texts = (couple[0].text, couple[1].text)
    comparisons = compare(adapter, inputs[0], [texts[0]], [texts[1]])
    first_maps = [comparison.first for comparison in comparisons]
    views = _views(first_maps, inputs[0], couple[0].images, prompts.processor)
    return Twins(numbers, texts, (answers[0], answers[1]), views[0].picture, comparisons[0])


def _answers(adapter: EmmaAdapter, prompts: Prompts, inputs: Any, expected: str | None, max_new_tokens: int) -> Answers:
    with_adapter = _generate(adapter, prompts, inputs, max_new_tokens)
    with adapter.disable_adapter():
        without = _generate(adapter, prompts, inputs, max_new_tokens)
    return Answers(with_adapter, without, expected)


def _generate(adapter: EmmaAdapter, prompts: Prompts, inputs: Any, max_new_tokens: int) -> str:
    model: Any = adapter.model
    inputs = inputs.to(next(model.parameters()).device)
    with torch.no_grad(), in_eval_mode(model):
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
    new = ids[0, inputs["input_ids"].shape[1] :]
    return str(prompts.processor.tokenizer.decode(new, skip_special_tokens=True)).strip()


def _views(maps: Sequence[TokenMap], inputs: Mapping[str, Any], images: Sequence[Any], processor: Any) -> list[View]:
    """Return one view for each image whose tiles have known places in it; else one for each tile."""
    pictures = encoded_pictures(inputs, processor)
    # If there is one picture for each map, they are in the same order.
    picture_of = dict(zip(map(id, maps), pictures, strict=True)) if len(pictures) == len(maps) else {}
    views: list[View] = []
    for medium, entries in groupby(maps, key=lambda token_map: token_map.medium):
        tiles = list(entries)
        placed = all(tile.box is not None and tile.norm.ndim == 2 for tile in tiles)
        if placed and len(tiles) > 1:
            views.append(View(f"image {medium + 1}", _image(images, medium), tuple(tiles)))
            continue
        for tile in tiles:
            picture = picture_of.get(id(tile)) or (_image(images, medium) if placed else None)
            # Some families treat each tile as an image of its own.
            kind = "image" if len(maps) == len(images) else "tile"
            views.append(View(f"{kind} {len(views) + 1}", picture, (tile,)))
    return views


def _image(images: Sequence[Any], number: int) -> Any:
    return images[number] if number < len(images) else None
