"""Could an adapter help? What the model's own representations say before any training."""

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

Verdict = Literal["can help", "reaches the model already", "not linear in the visual tokens", "not in the instruction"]

#: Grid that visual tokens are averaged to, so that images of all sizes have as many features.
_COARSE = 4
_MEANINGS: dict[Verdict, str] = {
    "can help": "the answer is in the visual tokens, less of it behind the projector, and the instruction says where: "
    "an adapter can help",
    "reaches the model already": "what is in the visual tokens of the answer passes the projector anyway: training the "
    "language model (LoRA) may do as well",
    "not linear in the visual tokens": "no linear map reads the answer off the visual tokens: an adapter "
    "that picks among them will hardly find it, even if the model answers such questions already",
    "not in the instruction": "the instruction encoding doesn't tell what is asked: try another instruction_encoder",
}


@dataclass(frozen=True)
class Asked:
    """The rows that ask for one attribute."""

    name: str
    #: Of the answer, from the visual tokens, and from the projector's output without an adapter.
    visual: Probe
    projected: Probe
    #: ``visual.accuracy - projected.accuracy`` on the same rows, and its standard error.
    lost: float
    lost_error: float
    verdict: Verdict


@dataclass(frozen=True)
class Diagnosis:
    """Whether an adapter can help a model with some questions."""

    attributes: tuple[Asked, ...]
    #: Of what is asked, from the instruction tokens; None if all rows ask the same.
    instruction: Probe | None

    @property
    def verdict(self) -> Verdict:
        """That of most rows."""
        rows: dict[Verdict, int] = {}
        for asked in self.attributes:
            rows[asked.verdict] = rows.get(asked.verdict, 0) + asked.visual.samples
        return max(rows, key=lambda verdict: rows[verdict])

    @property
    def meaning(self) -> str:
        """The verdict in a sentence."""
        return _MEANINGS[self.verdict]

    def table(self) -> str:
        """GitHub Markdown: accuracies in %, with 95 % intervals, beside chance and the shuffled control."""
        lines = [
            "| asked | rows | chance | shuffled | visual tokens | behind the projector | verdict |",
            "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
        ]
        for asked in self.attributes:
            own = asked.visual
            lines.append(
                f"| {asked.name} | {own.samples} | {own.chance:.0%} | {own.shuffled:.0%} | {own.told()} | "
                f"{asked.projected.told()} | {asked.verdict} |"
            )
        if (told := self.instruction) is not None:
            lines.append(
                f"| *what is asked* | {told.samples} | {told.chance:.0%} | {told.shuffled:.0%} | instruction: "
                f"{told.told()} | | |"
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
    """Is the answer linearly decodable from the visual tokens, still so behind the projector, and is what is asked
    decodable from the instruction tokens?

    An adapter can only keep what the visual tokens hold, tells from the instruction alone what to keep, and gains
    nothing where the projector lets everything pass. The answers are probed among the rows that ask for the same,
    because the original model's visual tokens don't know what is asked.

    Args:
        model: a patched model, trained or not, or its handle: visual tokens and the projector's output are read as
            without an adapter, instructions as its encoder encodes them.
        batches: of what the processor returns, prompts without answers.
        answers: one for each row that shows an image, in order: the label to decode, texts or integers.
        asked: what each of these rows asks for, such as ``"top left"``; default: all ask for the same.
        folds: of the cross-validation.
        shuffles: of the labels, for the control.
        seed: of both.

    Raises:
        PatchError: if the model is not patched.
        AnalysisError: if labels are missing, or nothing is asked often enough for a probe.
    """
    visual, projected, instructions = _features(model, batches)
    names = np.array(["all"] * len(visual) if asked is None else [str(one) for one in asked])
    labels = np.array([str(one) for one in answers])
    if not len(visual) == len(names) == len(labels):
        raise AnalysisError(
            f"{len(visual)} rows show an image, and there are {len(labels)} answers and {len(names)} of what is asked: "
            "give one of each for each row"
        )
    settings = {"folds": folds, "shuffles": shuffles, "seed": seed}
    told = probe(instructions, names, **settings) if len(set(names)) > 1 else None
    found = []
    for name in dict.fromkeys(names.tolist()):
        rows = names == name
        if not _enough(labels[rows], folds):
            continue
        own = probe(visual[rows], labels[rows], **settings)
        behind = probe(projected[rows], labels[rows], **settings)
        difference = own.right.astype(float) - behind.right
        lost, error = float(difference.mean()), float(difference.std(ddof=1) / np.sqrt(len(difference)))
        verdict = _verdict(own, behind, lost - Z * error > 0, told)
        found.append(Asked(name, own, behind, lost, error, verdict))
    if not found:
        raise AnalysisError(
            f"nothing is asked often enough: a probe with {folds} folds needs two answers with at least {folds} rows "
            "each"
        )
    return Diagnosis(tuple(found), told)


def _verdict(visual: Probe, projected: Probe, loses: bool, told: Probe | None) -> Verdict:
    if not visual.decodable:
        # What mixes tokens, as a projector that attends does, may make it readable.
        return "reaches the model already" if projected.decodable else "not linear in the visual tokens"
    if not loses:
        return "reaches the model already"
    return "can help" if told is None or told.decodable else "not in the instruction"


def _enough(labels: Any, folds: int) -> bool:
    return int((np.unique(labels, return_counts=True)[1] >= folds).sum()) > 1


def _features(model: Model, batches: Iterable[Mapping[str, Any]]) -> tuple[Any, Any, Any]:
    """``[n, F]`` each: of the visual tokens, the projector's output, and the instruction tokens of each row."""
    visual: list[list[Tensor]] = []
    projected: list[list[Tensor]] = []
    instructions: list[Tensor] = []
    for batch in observed_batches(model, batches, projected=True):
        for _, entries in batch:
            visual.append([_coarse(entry) for entry in entries])
            parts = [entry.projected_before for entry in entries if not (entry.shared and entry.index)]
            projected.append([_pooled(part) for part in parts if part is not None])
            instructions.append(_encoding(entries[0]))
    return _stacked(visual), _stacked(projected), torch.stack(instructions).numpy()


def _stacked(parts: list[list[Tensor]]) -> Any:
    """Side by side if all rows have as many parts, else their means."""
    same = len({len(row) for row in parts}) == 1
    return torch.stack([torch.cat(row) if same else torch.stack(row).mean(0) for row in parts]).numpy()


def _coarse(entry: VisualEntry) -> Tensor:
    """``[F]``, the tokens averaged to a coarse grid."""
    if entry.grid is None:
        return _pooled(entry.before)
    image = entry.before.T.unflatten(1, entry.grid)
    return F.adaptive_avg_pool2d(image, (_COARSE, _COARSE)).flatten()


def _pooled(tokens: Tensor) -> Tensor:
    """``[F]``, the tokens of a sequence averaged to at most as many as a coarse grid has."""
    return F.adaptive_avg_pool1d(tokens.T, _COARSE**2).flatten()


def _encoding(entry: VisualEntry) -> Tensor:
    """``[2 Dt]``, the mean and the last of the instruction tokens."""
    tokens = entry.instruction if entry.instruction_mask is None else entry.instruction[entry.instruction_mask]
    if not len(tokens):
        return torch.zeros(2 * entry.instruction.shape[-1])
    return torch.cat([tokens.mean(0), tokens[-1]])
