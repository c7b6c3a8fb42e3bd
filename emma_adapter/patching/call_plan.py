"""One call of a patched model: what it was given, and its plan, the instruction of each row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..instructions.pipeline import Instruction, InstructionTokens
from ..models.feature_calls import FeatureCall


@dataclass(frozen=True)
class OuterCall:
    """What only the outer model's call tells."""

    labels: Tensor | None = None
    assistant_mask: Tensor | None = None
    instruction: Instruction | None = None
    instruction_mask: Tensor | None = None
    #: False where no gradients were recorded when the call was made.
    records_gradients: bool = False


@dataclass(frozen=True)
class GivenPrompt:
    """The prompt as a wrapper was given it that puts virtual tokens before it, as PEFT's prompt tuning."""

    input_ids: Tensor
    attention_mask: Tensor | None
    labels: Tensor | None

    def in_place_of(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of the call that the wrapper makes, with the prompt as it was."""
        return {**arguments, "input_ids": self.input_ids, "attention_mask": self.attention_mask}

    def is_end_of(self, arguments: Mapping[str, Any]) -> bool:
        """Whether a call's prompt can be this one with virtual tokens before it, or in its cache."""
        ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
        if isinstance(ids, Tensor):
            return ids.shape == self.input_ids.shape
        rows, length = self.input_ids.shape
        return isinstance(embeds, Tensor) and embeds.shape[0] == rows and embeds.shape[1] >= length


@dataclass(frozen=True)
class CallPlan:
    """What the projector's hook needs to know of the call it is in.

    Its rows are those of the batch, or the samples that are packed in them.
    """

    #: None in a plan that is remembered, which the model itself holds.
    inner: nn.Module | None
    #: Name of the adapter that the instruction is encoded for.
    adapter: str
    instruction: InstructionTokens
    #: For each modality, placeholder tokens per row ``[B]``.
    placeholders: Mapping[str, Tensor]
    #: What the call itself says of its images, where no feature method does.
    feature_call: FeatureCall
    #: Rows of the call for each row of the instruction: generation repeats rows for beams.
    repeats: int = 1

    def without_model(self) -> CallPlan:
        return replace(self, inner=None)


@dataclass(frozen=True)
class Bypass:
    """In the place of a plan or a route: the adapter is disabled."""

    #: Name of the adapter that was active.
    adapter: str


@dataclass(frozen=True)
class PinnedPrompt:
    """What a ``generate`` was asked, for the calls of forward that it makes."""

    plan: CallPlan
    #: ``[B, L]``, without what a cache holds; None if the prompt was given as embeddings.
    input_ids: Tensor | None

    def is_prompt_of(self, arguments: Mapping[str, Any]) -> bool:
        """False if the user calls forward while ``generate`` runs, as from a logits processor, about something else."""
        ids, own = arguments.get("input_ids"), self.input_ids
        if ids is None or own is None:
            return True
        rows, length = len(own), min(own.shape[1], ids.shape[1])
        if len(ids) % rows:
            return False
        asked = ids[:: len(ids) // rows, :length].to(own.device)
        # Its end, if a cache that we weren't shown holds the rest.
        return any(torch.equal(asked, part) for part in (own[:, :length], own[:, own.shape[1] - length :]))


def same_plan(one: CallPlan | Bypass, other: CallPlan | Bypass) -> bool:
    """Whether both give every row the same instruction."""
    if isinstance(one, Bypass) or isinstance(other, Bypass):
        return one == other
    return (
        one.adapter == other.adapter
        and one.repeats == other.repeats
        and all(torch.equal(found, other.placeholders[modality]) for modality, found in one.placeholders.items())
        and one.instruction.equals(other.instruction)
    )
