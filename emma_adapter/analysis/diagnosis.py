"""A diagnosis, before any training, of whether an adapter could help a model, from the model's own representations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import AnalysisError
from .observing import Model, VisualEntry, observed_batches
from .probes import Probe, Z, probe

Verdict = Literal[
    "can help",
    "reaches the model already",
    "not linear in the visual tokens",
    "not in the instruction",
    "can't be told",
]

#: Grid that visual tokens are averaged to, so that images of all sizes have as many features.
_COARSE = 4
#: How far from chance to always right a probe gets that can't know which of two questions is asked.
_HALF = 0.5
#: The fewest rows with the same instruction that are probed on their own.
_ROWS_APART = 25
#: Instructions are the same if their encodings differ by less than this share of their length, which is rounding.
_ROUNDING = 3e-3
_MEANINGS: dict[Verdict, str] = {
    "can help": "the answer is in the visual tokens, less of it behind the projector, and the instruction says where: "
    "an adapter can help",
    "reaches the model already": "most of the answer is read behind the projector, and not less than before it: "
    "training the language model (LoRA) may do as well",
    "not linear in the visual tokens": "no linear map reads the answer off the visual tokens: an adapter "
    "that picks among them will hardly find it, even if the model answers such questions already",
    "not in the instruction": "the instruction encoding doesn't tell what is asked: try another instruction_encoder",
    "can't be told": "the probes read too little of the answer to say what passes the projector: name what is asked so "
    "exactly that one image has one answer, as “digit, top left”, and give more rows of each",
}


@dataclass(frozen=True)
class Asked:
    """The rows that ask for one attribute."""

    name: str
    #: Probes of the answer, from the visual tokens and from the projector's output without an adapter.
    visual: Probe
    projected: Probe
    #: ``visual.accuracy - projected.accuracy`` on the same rows, and its standard error.
    lost: float
    lost_error: float
    verdict: Verdict
    #: The number of different instructions of these rows, and whether each was probed on its own.
    instructions: int = 1
    apart: bool = False

    @property
    def loses(self) -> bool:
        """Whether the projector loses something beyond the error bar."""
        return self.lost - Z * self.lost_error > 0


@dataclass(frozen=True)
class Diagnosis:
    """Whether an adapter can help a model with some questions."""

    attributes: tuple[Asked, ...]
    #: Probe of what is asked, from the instruction tokens; None if all rows ask the same.
    instruction: Probe | None

    @property
    def verdict(self) -> Verdict:
        """The verdict on the most rows, where ``"can't be told"`` counts only if there is no other."""
        rows: dict[Verdict, int] = {"can't be told": 0}
        for attribute in self.attributes:
            if attribute.verdict != "can't be told":
                rows[attribute.verdict] = rows.get(attribute.verdict, 0) + attribute.visual.samples
        return max(rows, key=lambda verdict: rows[verdict])

    @property
    def meaning(self) -> str:
        """The verdict in a sentence."""
        return _MEANINGS[self.verdict]

    def table(self) -> str:
        """Return a GitHub Markdown table: accuracies in % with 95 % intervals, chance, and the shuffled control."""
        lines = [
            "| asked | rows | chance | shuffled | visual tokens | behind the projector | verdict |",
            "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
        ]
        for attribute in self.attributes:
            visual = attribute.visual
            lines.append(
                f"| {attribute.name} | {visual.samples} | {visual.chance:.0%} | {visual.shuffled:.0%} | "
                f"{visual.told()} | {attribute.projected.told()} | {attribute.verdict} |"
            )
        if (instruction := self.instruction) is not None:
            lines.append(
                f"| *what is asked* | {instruction.samples} | {instruction.chance:.0%} | {instruction.shuffled:.0%} | "
                f"instruction: {instruction.told()} | | |"
            )
        return "\n".join([*lines, "", f"**{self.verdict}**: {self.meaning}"])


def diagnose(
    model: Model,
    batches: Iterable[Mapping[str, Any]],
    answers: Sequence[Any],
    asked: Sequence[Any] | None = None,
    *,
    folds: int = 5,
    shuffles: int = 19,
    seed: int = 0,
) -> Diagnosis:
    """Diagnose with linear probes whether an adapter could help a model with some questions.

    The probes tell whether the answer is linearly decodable from the visual tokens, whether it still is behind the
    projector, and whether what is asked is decodable from the instruction tokens. An adapter can only keep what the
    visual tokens hold, decides from the instruction alone what to keep, and gains nothing where the projector lets
    everything pass. The original model's visual tokens don't depend on the question, so answers are probed among the
    rows that ask for the same. Where such rows have different instructions nevertheless, as "what is at the top left?"
    and "what is at the top right?", each instruction is probed on its own if at least half of the rows have one that 25
    of them share; else they are probed together, and what the probe then doesn't read proves nothing.

    Args:
        model: a patched model, trained or not, or its handle. Visual tokens and the projector's output are those
            without an adapter; instructions are encoded by the adapter's encoder.
        batches: outputs of the processor for prompts without answers.
        answers: one for each row that shows an image, in order: the label to decode, texts or integers.
        asked: what each of these rows asks for, such as ``"top left"``; default: all ask for the same.
        folds: of the cross-validation.
        shuffles: of the labels, for the control.
        seed: of folds and shuffles.

    Raises:
        PatchError: if the model is not patched.
        AnalysisError: if labels are missing, or nothing is asked often enough for a probe.
    """
    visual, projected, instructions, wordings = _features(model, batches)
    names = np.array(["all"] * len(visual) if asked is None else [str(name) for name in asked])
    labels = np.array([str(answer) for answer in answers])
    if not len(visual) == len(names) == len(labels):
        raise AnalysisError(
            f"{len(visual)} rows show an image, and there are {len(labels)} answers and {len(names)} of what is asked: "
            "give one of each for each row"
        )
    settings = {"folds": folds, "shuffles": shuffles, "seed": seed}
    instruction_probe = probe(instructions, names, **settings) if len(set(names)) > 1 else None
    attributes = []
    numbers = _instruction_numbers(wordings)
    for name in dict.fromkeys(names.tolist()):
        rows = np.flatnonzero(names == name)
        if not _enough(labels[rows], folds):
            continue
        can_be_apart = _probed_apart(numbers[rows], labels[rows], folds)
        apart = 2 * can_be_apart.sum() >= len(rows)
        groups = None
        if apart:
            rows = rows[can_be_apart]
            groups = numbers[rows]
        before, behind = (
            probe(features[rows], labels[rows], groups=groups, **settings) for features in (visual, projected)
        )
        lost, error = _difference(before, behind)
        count = len(np.unique(numbers[names == name]))
        verdict = _verdict(before, behind, lost - Z * error > 0, instruction_probe, mixed=count > 1 and not apart)
        attributes.append(Asked(name, before, behind, lost, error, verdict, count, bool(apart)))
    if not attributes:
        raise AnalysisError(
            f"nothing is asked often enough: a probe with {folds} folds needs two answers with at least {folds} rows "
            "each"
        )
    return Diagnosis(tuple(attributes), instruction_probe)


def _verdict(visual: Probe, projected: Probe, loses: bool, instruction: Probe | None, *, mixed: bool) -> Verdict:
    if visual.decodable and loses:
        return "can help" if instruction is None or instruction.decodable else "not in the instruction"
    if projected.decodable and projected.level[0] > _HALF:
        return "reaches the model already"
    unreadable = not visual.decodable and not projected.decodable and visual.level[1] < _HALF
    return "not linear in the visual tokens" if unreadable and not mixed else "can't be told"


def _difference(first: Probe, second: Probe) -> tuple[float, float]:
    """Return ``first.accuracy - second.accuracy`` and its standard error, from the paired samples."""
    differences = first.right.astype(float) - second.right  # 0 for samples that were left out
    mean = differences.sum() / first.samples
    return float(mean), float(np.sqrt(((differences**2).sum() / first.samples - mean**2) / (first.samples - 1)))


def _probed_apart(numbers: Any, labels: Any, folds: int) -> Any:
    """Return which rows have an instruction that is asked often enough for a probe of its own, bool ``[n]``."""
    frequent = [
        number
        for number, count in zip(*np.unique(numbers, return_counts=True), strict=True)
        if count >= _ROWS_APART and _enough(labels[numbers == number], folds)
    ]
    return np.isin(numbers, frequent)


def _instruction_numbers(wordings: Any) -> Any:
    """Number the instructions, int ``[n]``, with equal numbers for equal instructions."""
    rng = np.random.default_rng(0)
    # A random projection keeps distances, and makes them cheap.
    keys = wordings @ rng.standard_normal((wordings.shape[1], 32)) / np.sqrt(32)
    first_rows: list[int] = []
    numbers = np.zeros(len(keys), dtype=int)
    for row, key in enumerate(keys):
        distances = np.linalg.norm(keys[first_rows] - key, axis=1)
        near = np.flatnonzero(distances <= _ROUNDING * max(float(np.linalg.norm(key)), 1e-12))
        if not len(near):
            first_rows.append(row)
        numbers[row] = near[0] if len(near) else len(first_rows) - 1
    return numbers


def _enough(labels: Any, folds: int) -> bool:
    return int((np.unique(labels, return_counts=True)[1] >= folds).sum()) > 1


def _features(model: Model, batches: Iterable[Mapping[str, Any]]) -> tuple[Any, Any, Any, Any]:
    """Return features of each row's visual tokens, projector output and instruction, and what identifies the latter.

    Each is ``[n, F]``. The last ones are equal for equal instructions, and else differ.
    """
    visual: list[list[Tensor]] = []
    projected: list[list[Tensor]] = []
    instructions: list[Tensor] = []
    wordings: list[Tensor] = []
    for batch in observed_batches(model, batches, projected=True):
        for _, entries in batch:
            visual.append([_coarse(entry) for entry in entries])
            parts = [entry.projected_before for entry in entries if not (entry.shared and entry.index)]
            projected.append([_pooled(part) for part in parts if part is not None])
            tokens = _instruction(entries[0])
            instructions.append(torch.cat([tokens.mean(0), tokens[-1]]))
            wordings.append(_order_sensitive_sum(tokens))
    return _stacked(visual), _stacked(projected), torch.stack(instructions).numpy(), torch.stack(wordings).numpy()


def _stacked(parts: list[list[Tensor]]) -> Any:
    """Return the concatenated parts of each row if all rows have as many, else their means."""
    equally_many = len({len(row) for row in parts}) == 1
    return torch.stack([torch.cat(row) if equally_many else torch.stack(row).mean(0) for row in parts]).numpy()


def _coarse(entry: VisualEntry) -> Tensor:
    """Return the tokens averaged to a coarse grid, ``[F]``."""
    if entry.grid is None:
        return _pooled(entry.before)
    image = entry.before.T.unflatten(1, entry.grid)
    return F.adaptive_avg_pool2d(image, (_COARSE, _COARSE)).flatten()


def _pooled(tokens: Tensor) -> Tensor:
    """Return a sequence's tokens averaged to as many as a coarse grid has, ``[F]``."""
    return F.adaptive_avg_pool1d(tokens.T, _COARSE**2).flatten()


def _instruction(entry: VisualEntry) -> Tensor:
    """Return the instruction tokens, ``[T, Dt]``; a single one of zeros for an empty instruction."""
    tokens = entry.instruction if entry.instruction_mask is None else entry.instruction[entry.instruction_mask]
    return tokens if len(tokens) else torch.zeros(1, entry.instruction.shape[-1])


def _order_sensitive_sum(tokens: Tensor) -> Tensor:
    """Return the sum of the tokens, ``[Dt]``, each weighted by its position so that the order of the words counts."""
    return (tokens * torch.sin(torch.arange(1.0, len(tokens) + 1)).unsqueeze(1)).sum(0)
