"""The sections that read all questions; each is there, or says why it isn't."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ..adapter.handle import EmmaAdapter
from ..alignment.fusion import LinearFusion, ModulationFusion
from ..alignment.fusion.cross_attention import CrossAttentionFusion
from ..analysis import (
    Diagnosis,
    PairDistances,
    attention_mass,
    diagnose,
    information_gain,
    mask_statistics,
    pair_distances,
    weight_shares,
)
from ..errors import AnalysisError
from ..models.prompts import Prompts
from .contents import Absent, Information, Reading
from .questions import Entry, find_pairs, normalised

#: A label for the progress, if it is to be told, and some questions; gives their batches.
Batches = Callable[[str | None, Sequence[Entry]], AbstractContextManager[Iterator[Any]]]

_MIN_ANSWERED = 50
#: On average; answers that are rarer are no labels.
_ROWS_PER_LABEL = 5
#: Of free answers, the share that must be unlike all others.
_DIFFERENT = 0.9


def reading(adapter: EmmaAdapter, entries: Sequence[Entry], batches: Batches) -> Reading | Absent:
    """What the adapter reads of an instruction."""
    fusion = adapter.alignment.fusion
    if not isinstance(fusion, (LinearFusion, CrossAttentionFusion)):
        return Absent(
            f"What the fusion “{adapter.config.fusion}” reads isn't known; it is for linear, attention and modulation."
        )
    try:
        if isinstance(fusion, LinearFusion):
            return Reading(weights=weight_shares(adapter))
        with batches("Attention", entries) as own:
            attention = attention_mass(adapter, own)
        if not isinstance(fusion, ModulationFusion):
            return Reading(attention=attention)
        with batches("Mask", entries) as own:
            return Reading(attention=attention, mask=mask_statistics(adapter, own))
    except AnalysisError as error:
        return _absent(error)


def information(
    adapter: EmmaAdapter, entries: Sequence[Entry], batches: Batches, prompts: Prompts
) -> Information | Absent:
    """What the visual tokens tell of the answers in the data, before and after."""
    answered = [entry for entry in entries if entry.answer is not None]
    if len(answered) < _MIN_ANSWERED:
        return Absent(
            f"{_rows(len(answered), len(entries))} an answer, and an estimate of what visual tokens tell of the answer "
            f"needs at least {_MIN_ANSWERED}."
        )
    answers = [normalised(str(entry.answer)) for entry in answered]
    labels = len(set(answers))
    if labels < 2:
        return Absent("All answers in the data are the same, so that nothing can be told of them.")
    responses: Any = answers
    few = labels * _ROWS_PER_LABEL <= len(answers)
    if not few:
        # As vectors no two may be the same; before alignment, all questions about an image see it alike.
        answered = list({entry.images: entry for entry in reversed(answered)}.values())[::-1]
        answers = [normalised(str(entry.answer)) for entry in answered]
        if len(answered) < _MIN_ANSWERED or len(set(answers)) < _DIFFERENT * len(answers):
            return Absent(
                f"The answers are too different to be labels ({labels:,} in all), and an estimate for free answers "
                f"needs at least {_MIN_ANSWERED} images whose answers differ; there are {len(answered):,} images with "
                f"{len(set(answers)):,} answers."
            )
        responses = torch.stack([_encoded(adapter, prompts, answer) for answer in answers]).numpy()
    try:
        with batches("Information", answered) as own:
            return Information(information_gain(adapter, own, responses), labels if few else None)
    except AnalysisError as error:
        return _absent(error)


def pairs(adapter: EmmaAdapter, entries: Sequence[Entry], batches: Batches) -> PairDistances | Absent | None:
    """Distances of near-identical images; None if the data name none."""
    found, odd = find_pairs(entries)
    if odd:
        return Absent(f"Of the names in the column “pair”, {odd} are not those of exactly two questions with an image.")
    if not found:
        return None
    first, second = ([couple[side] for couple in found] for side in (0, 1))
    try:
        with batches("Pairs", first) as one, batches(None, second) as other:
            return pair_distances(adapter, zip(one, other, strict=True))
    except AnalysisError as error:
        return _absent(error)


def diagnosis(adapter: EmmaAdapter, entries: Sequence[Entry], batches: Batches) -> Diagnosis | Absent:
    """Whether an adapter can help with such questions at all."""
    known = [entry for entry in entries if entry.answer is not None and entry.attribute is not None]
    if not known:
        return Absent(
            f"{_rows(0, len(entries))} both an answer and an attribute (a column that says in few words what is "
            "asked), so that nothing can be probed."
        )
    answers = [normalised(str(entry.answer)) for entry in known]
    try:
        with batches("Diagnosis", known) as own:
            return diagnose(adapter, own, answers, [entry.attribute for entry in known])
    except AnalysisError as error:
        return _absent(error)


def _absent(error: AnalysisError) -> Absent:
    text = str(error)
    return Absent(f"{text[0].upper()}{text[1:]}.")


def _rows(some: int, all_: int) -> str:
    some_text = "None" if not some else f"{some:,}"
    return f"{some_text} of the {all_:,} questions {'have' if some != 1 else 'has'}"


def _encoded(adapter: EmmaAdapter, prompts: Prompts, answer: str) -> Tensor:
    """``[L]``, the mean of the language model's embeddings of an answer's tokens."""
    model: Any = adapter.model
    embed = model.get_input_embeddings()
    ids = prompts.processor.tokenizer(answer or " ", add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        embedded: Tensor = embed(ids.to(next(model.parameters()).device))
    return embedded[0].float().mean(0).cpu()
