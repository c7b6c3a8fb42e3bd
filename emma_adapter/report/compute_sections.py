"""The sections that read all questions; each function returns a section, or why it can't be computed."""

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

#: Takes a label for the progress (None shows none) and some questions, and returns their batches.
Batches = Callable[[str | None, Sequence[Entry]], AbstractContextManager[Iterator[Any]]]

_MIN_ANSWERED = 50
#: On average; rarer answers are not taken as labels.
_ROWS_PER_LABEL = 5
#: The least share of different answers among free answers.
_DIFFERENT = 0.9


def reading(adapter: EmmaAdapter, entries: Sequence[Entry], batches: Batches) -> Reading | Absent:
    """Compute which parts of an instruction the adapter reads."""
    fusion = adapter.alignment.fusion
    if not isinstance(fusion, (LinearFusion, CrossAttentionFusion)):
        return Absent(
            f"What the fusion “{adapter.config.fusion}” reads isn't known; it is for linear, attention and modulation."
        )
    try:
        if isinstance(fusion, LinearFusion):
            return Reading(weights=weight_shares(adapter))
        with batches("Attention", entries) as inputs:
            attention = attention_mass(adapter, inputs)
        if not isinstance(fusion, ModulationFusion):
            return Reading(attention=attention)
        with batches("Mask", entries) as inputs:
            return Reading(attention=attention, mask=mask_statistics(adapter, inputs))
    except AnalysisError as error:
        return _absent(error)


def information(
    adapter: EmmaAdapter, entries: Sequence[Entry], batches: Batches, prompts: Prompts
) -> Information | Absent:
    """Compute the information of the visual tokens about the answers in the data, before and after alignment."""
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
    are_labels = labels * _ROWS_PER_LABEL <= len(answers)
    if not are_labels:
        # The estimator for vectors allows no repeated samples, and before alignment an image's tokens are the same for
        # all its questions.
        answered = list({entry.images: entry for entry in reversed(answered)}.values())[::-1]
        answers = [normalised(str(entry.answer)) for entry in answered]
        if len(answered) < _MIN_ANSWERED or len(set(answers)) < _DIFFERENT * len(answers):
            return Absent(
                f"The answers are too different to be labels ({labels:,} in all), and an estimate for free answers "
                f"needs at least {_MIN_ANSWERED} images whose answers differ; there are {len(answered):,} images with "
                f"{len(set(answers)):,} answers."
            )
        responses = torch.stack([_encode(adapter, prompts, answer) for answer in answers]).numpy()
    try:
        with batches("Information", answered) as inputs:
            return Information(information_gain(adapter, inputs, responses), labels if are_labels else None)
    except AnalysisError as error:
        return _absent(error)


def pairs(adapter: EmmaAdapter, entries: Sequence[Entry], batches: Batches) -> PairDistances | Absent | None:
    """Compute distances between near-identical images; None if the data name none."""
    couples, odd_names = find_pairs(entries)
    if odd_names:
        return Absent(
            f"Of the names in the column “pair”, {odd_names} are not those of exactly two questions with an image."
        )
    if not couples:
        return None
    first, second = ([couple[side] for couple in couples] for side in (0, 1))
    try:
        with batches("Pairs", first) as first_inputs, batches(None, second) as second_inputs:
            return pair_distances(adapter, zip(first_inputs, second_inputs, strict=True))
    except AnalysisError as error:
        return _absent(error)


def diagnosis(adapter: EmmaAdapter, entries: Sequence[Entry], batches: Batches) -> Diagnosis | Absent:
    """Diagnose whether an adapter can help with such questions at all."""
    labelled = [entry for entry in entries if entry.answer is not None and entry.attribute is not None]
    if not labelled:
        return Absent(
            f"{_rows(0, len(entries))} both an answer and an attribute (a column that says in few words what is "
            "asked), so that nothing can be probed."
        )
    answers = [normalised(str(entry.answer)) for entry in labelled]
    try:
        with batches("Diagnosis", labelled) as inputs:
            return diagnose(adapter, inputs, answers, [entry.attribute for entry in labelled])
    except AnalysisError as error:
        return _absent(error)


def _absent(error: AnalysisError) -> Absent:
    text = str(error)
    return Absent(f"{text[0].upper()}{text[1:]}.")


def _rows(count: int, total: int) -> str:
    return f"{f'{count:,}' if count else 'None'} of the {total:,} questions {'has' if count == 1 else 'have'}"


def _encode(adapter: EmmaAdapter, prompts: Prompts, answer: str) -> Tensor:
    """Return the mean of the language model's embeddings of an answer's tokens, ``[L]``."""
    model: Any = adapter.model
    embed = model.get_input_embeddings()
    ids = prompts.processor.tokenizer(answer or " ", add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        embedded: Tensor = embed(ids.to(next(model.parameters()).device))
    return embedded[0].float().mean(0).cpu()
