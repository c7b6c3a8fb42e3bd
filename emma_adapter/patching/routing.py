"""Routing: which instruction each visual token of a call meets, and which row of the batch an image belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..alignment.fusion.packed_images import Packing
from ..alignment.module import EmmaAlignment
from ..errors import RoutingError
from ..instructions.pipeline import InstructionTokens
from ..models.families import MediaLayout, ModelFamily, ProjectorCall, mismatch
from ..models.feature_calls import FeatureCall, checked_layout, projector_call
from ..models.projected_tokens import projected_layout
from .call_plan import Bypass, CallPlan


def rows_of_media(
    placeholders: Tensor,
    tokens_per_medium: Sequence[int],
    *,
    repeats: int = 1,
    modality: str = "image",
    before: int | None = None,
) -> Tensor:
    """Return the row of each image (or video) of a batch.

    Media fill the placeholder tokens in the order of the batch, first row first, as transformers scatters them.

    Args:
        placeholders: ``[B]``, placeholder tokens in each row.
        tokens_per_medium: tokens that each medium takes in the language model, in order. A medium of 0 tokens, which
            no prompt shows, gets some row.
        repeats: how many times in succession each row stands in ``placeholders``.
        modality: name of the media, for error messages.
        before: number of placeholder tokens that earlier media fill, where more may follow; None if these are all.

    Returns:
        ``[len(tokens_per_medium)]``, int64, on the device of ``placeholders``: rows before they were repeated.

    Raises:
        RoutingError: if totals differ, or a medium would cross from one row into the next.
    """
    lengths = torch.as_tensor(tokens_per_medium, device=placeholders.device)
    ends = lengths.cumsum(0) + (before or 0)
    row_ends = placeholders.cumsum(0)
    rows = torch.searchsorted(row_ends, ends - lengths, right=True).clamp(max=len(placeholders) - 1) // repeats
    if not torch.compiler.is_compiling():
        last_rows = torch.searchsorted(row_ends, ends - 1, right=True) // repeats
        expected, found = int(lengths.sum()), int(placeholders.sum()) - (before or 0)
        if expected != found if before is None else expected > found:
            raise RoutingError(
                f"{mismatch(modality, found, expected)}: {len(tokens_per_medium)} {modality}s take {expected} tokens, "
                f"but the prompts hold {found} placeholder tokens. Let the model's processor make text and images "
                "together, and let nothing cut them off (max_length, truncation)"
            )
        if bool(((rows != last_rows) & (lengths > 0)).any()):
            raise RoutingError(
                "an image would begin in one row of the batch and end in another (placeholder tokens per row: "
                f"{placeholders.tolist()}, tokens per image: {list(tokens_per_medium)}): give the images in the order "
                "of the rows, and let the model's processor make text and images together"
            )
    return rows


@dataclass(frozen=True)
class Before:
    """What the calls of a projector took that came before in the same pass."""

    calls: int = 0
    media: int = 0
    #: Placeholder tokens.
    tokens: int = 0

    def and_then(self, layout: MediaLayout) -> Before:
        return Before(self.calls + 1, self.media + len(layout.tokens), self.tokens + sum(layout.tokens))


@dataclass(frozen=True)
class RoutedInstruction:
    """The instruction for every part of one projector input."""

    layout: MediaLayout
    rows: Tensor  # [media], rows of the instruction
    #: Name of the adapter that the instruction is encoded for.
    adapter: str
    instruction: InstructionTokens
    modality: str
    #: Side of the square of visual tokens that the projector merges into one.
    projector_merge: int
    #: What earlier calls of the projector in the same pass took.
    before: Before = Before()

    @property
    def unchecked_tokens(self) -> tuple[str, int] | None:
        """Modality and number of placeholders that only the projector's output can be checked against.

        None where the input already told how many tokens its media take.
        """
        return (self.modality, sum(self.layout.tokens)) if self.layout.tokens_from_prompt else None

    def of_projected(self, projected: Tensor) -> RoutedInstruction:
        """Return the same routing for the projector's output.

        Raises:
            RoutingError: if the output can't be divided as the input was.
        """
        return replace(self, layout=projected_layout(self.layout, self.projector_merge, projected))

    def align(self, alignment: EmmaAlignment, visual_tokens: Tensor) -> Tensor:
        layout = self.layout
        per_medium = torch.as_tensor(layout.entries, device=self.rows.device)
        rows = self.rows.repeat_interleave(per_medium, output_size=sum(layout.entries))
        if layout.grids is None:
            instruction = self.instruction.of_rows(rows)
            return _laid_out_like(visual_tokens, alignment(visual_tokens, instruction.tokens, instruction.mask))
        flat = visual_tokens.reshape(-1, visual_tokens.shape[-1])
        packing = Packing(layout.grids, rows, layout.orders)
        aligned = alignment(flat, self.instruction.tokens, self.instruction.mask, packing=packing)
        return _laid_out_like(visual_tokens, aligned.view_as(visual_tokens))


@dataclass(frozen=True, eq=False)
class ObservedAlignment:
    """What an adapter did to the input or output of one projector, for an observer of the call."""

    #: Which of the model's projectors it was; see ``sites``.
    place: str
    route: RoutedInstruction
    call: ProjectorCall
    visual_tokens: Tensor
    aligned: Tensor


def same_route(one: RoutedInstruction | Bypass, other: RoutedInstruction | Bypass) -> bool:
    """Return whether both lead the same visual tokens to the same instructions."""
    if isinstance(one, Bypass) or isinstance(other, Bypass):
        return one == other
    return (
        one.adapter == other.adapter and torch.equal(one.rows, other.rows) and one.instruction.equals(other.instruction)
    )


def _laid_out_like(visual_tokens: Tensor, aligned: Tensor) -> Tensor:
    """Return aligned tokens in the memory layout of the visual tokens that they replace.

    The projector rounds differently for another layout, and an untrained adapter must not change a bit. LLaVA's visual
    tokens, for one, are a part of a larger tensor, which begins with the class token.
    """
    if aligned.stride() == visual_tokens.stride():
        return aligned
    return torch.empty_strided(
        visual_tokens.shape, visual_tokens.stride(), dtype=aligned.dtype, device=aligned.device
    ).copy_(aligned)


def route(
    family: ModelFamily, plan: CallPlan, feature_call: FeatureCall | None, visual_tokens: Tensor, before: Before
) -> RoutedInstruction:
    """Route the instructions of a call to the parts of a projector input.

    Args:
        family: of the model.
        plan: of the call.
        feature_call: the running feature method; None for a model without.
        visual_tokens: the projector's input.
        before: what earlier calls of the projector in this pass took.

    Raises:
        RoutingError: if images, visual tokens and placeholders don't match.
    """
    assert plan.inner is not None
    feature_call = plan.feature_call if feature_call is None else feature_call.within(plan.feature_call)
    placeholders = plan.placeholders[feature_call.modality]
    call = projector_call(plan.inner, feature_call, visual_tokens, placeholders, before.calls)
    layout = checked_layout(family, call)
    rows = rows_of_media(
        placeholders,
        layout.tokens,
        repeats=plan.repeats,
        modality=feature_call.modality,
        before=before.tokens if layout.continues else None,
    )
    if layout.rows is not None:
        rows = torch.as_tensor(layout.rows, device=rows.device) // plan.repeats
    merge = family.projector_merge(plan.inner)
    return RoutedInstruction(layout, rows, plan.adapter, plan.instruction, feature_call.modality, merge, before)


def route_without_prompt(
    family: ModelFamily,
    inner: nn.Module,
    adapter: str,
    instruction: InstructionTokens,
    feature_call: FeatureCall | None,
    visual_tokens: Tensor,
    before: Before,
) -> RoutedInstruction:
    """Route one instruction to all images, or one to each, outside of any call."""
    feature_call = feature_call or FeatureCall.of(family, family.modalities[0], None, {})
    layout = checked_layout(family, projector_call(inner, feature_call, visual_tokens, None, before.calls))
    media = len(layout.tokens)
    first = before.media if layout.continues else 0
    # Where more media may follow, their number is not known yet: there must be instructions for those so far.
    number = max(len(instruction), first + media) if layout.continues else media
    return RoutedInstruction(
        layout,
        torch.arange(first, first + media, device=visual_tokens.device),
        adapter,
        instruction.for_each(number, f"{feature_call.modality}s"),
        feature_call.modality,
        family.projector_merge(inner),
        before,
    )


def check_tokens(modality: str, placeholders: int, projected: Tensor) -> None:
    """Check that a projector put out one token for each placeholder.

    Args:
        modality: modality of what was projected.
        placeholders: number of placeholders in the prompts.
        projected: output of the projector, ``[..., D]``.

    Raises:
        RoutingError: if it didn't: the prompts hold placeholders of images that are not in this call, and its own
            images may have met the instruction of another row.
    """
    tokens = projected.shape[:-1].numel()
    if tokens != placeholders:
        raise RoutingError(
            f"{mismatch(modality, placeholders, tokens)}. Let the model's processor make text and images together, "
            "and let nothing cut them off (max_length, truncation). If a cache holds earlier turns of the prompt, pass "
            "it to generate as an argument of its own"
        )
