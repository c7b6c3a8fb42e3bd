"""One call of a patched model: the arguments it was given, and its plan, which is the instruction of each row."""

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
    """The arguments that only the outer model is given."""

    labels: Tensor | None = None
    assistant_mask: Tensor | None = None
    instruction: Instruction | None = None
    instruction_mask: Tensor | None = None
    #: True if gradients were recorded when the call was made.
    records_gradients: bool = False


@dataclass(frozen=True)
class GivenPrompt:
    """The prompt given to a wrapper that puts virtual tokens before it, such as PEFT's prompt tuning."""

    input_ids: Tensor
    attention_mask: Tensor | None
    labels: Tensor | None

    def in_place_of(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of the call that the wrapper makes, with the original prompt."""
        return {**arguments, "input_ids": self.input_ids, "attention_mask": self.attention_mask}

    def is_end_of(self, arguments: Mapping[str, Any]) -> bool:
        """Return whether a call's prompt can be this one, with the virtual tokens before it or in its cache."""
        ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
        if isinstance(ids, Tensor):
            return ids.shape == self.input_ids.shape
        rows, length = self.input_ids.shape
        return isinstance(embeds, Tensor) and embeds.shape[0] == rows and embeds.shape[1] >= length


@dataclass(frozen=True)
class CallPlan:
    """The instruction of each row of a call, for the projector's hook.

    Its rows are those of the batch, or the samples that are packed in them.
    """

    #: None in a remembered plan, since the model itself holds that one.
    inner: nn.Module | None
    #: Name of the adapter that the instruction is encoded for.
    adapter: str
    instruction: InstructionTokens
    #: For each modality, the number of placeholder tokens in each row, ``[B]``.
    placeholders: Mapping[str, Tensor]
    #: The images as the call itself describes them, for models that encode them without a feature method.
    feature_call: FeatureCall
    #: Rows of the call for each row of the instruction: generation repeats rows for beams.
    repeats: int = 1

    def without_model(self) -> CallPlan:
        return replace(self, inner=None)


@dataclass(frozen=True)
class Bypass:
    """Stands in for a plan or a route where the adapter is disabled."""

    #: Name of the adapter that was active.
    adapter: str


@dataclass(frozen=True)
class PinnedPrompt:
    """The prompt of a running ``generate`` and its plan, for the calls of forward that it makes."""

    plan: CallPlan
    #: ``[B, L]``, without what a cache holds; None if the prompt was given as embeddings.
    input_ids: Tensor | None

    def is_prompt_of(self, arguments: Mapping[str, Any]) -> bool:
        """Return whether a call of forward is about this prompt.

        It isn't if the user calls forward on something else while ``generate`` runs, as in a logits processor.
        """
        ids, pinned_ids = arguments.get("input_ids"), self.input_ids
        if ids is None or pinned_ids is None:
            return True
        rows, length = len(pinned_ids), min(pinned_ids.shape[1], ids.shape[1])
        if len(ids) % rows:
            return False
        prompt = ids[:: len(ids) // rows, :length].to(pinned_ids.device)
        # Or the end of the pinned prompt, if a cache that isn't among the arguments holds the rest.
        parts = (pinned_ids[:, :length], pinned_ids[:, pinned_ids.shape[1] - length :])
        return any(torch.equal(prompt, part) for part in parts)


def same_plan(one: CallPlan | Bypass, other: CallPlan | Bypass) -> bool:
    """Return whether both give every row the same instruction."""
    if isinstance(one, Bypass) or isinstance(other, Bypass):
        return one == other
    return (
        one.adapter == other.adapter
        and one.repeats == other.repeats
        and all(torch.equal(counts, other.placeholders[modality]) for modality, counts in one.placeholders.items())
        and one.instruction.equals(other.instruction)
    )
