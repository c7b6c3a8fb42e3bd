"""One call of a patched model: what is known of it, and which instruction each of its visual tokens meets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..alignment.fusion.packed_images import Packing
from ..alignment.module import EmmaAlignment
from ..errors import RoutingError
from ..instructions.pipeline import Instruction, InstructionTokens
from ..models.families import MediaLayout, ModelFamily, ProjectorCall, mismatch
from .routing import rows_of_media


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
class FeatureCall:
    """What is known of the images that are being encoded. Sizes only: pixels must not be kept alive."""

    modality: str
    sizes: Mapping[str, Any]
    pixel_shape: tuple[Any, ...] | None

    @classmethod
    def of(cls, family: ModelFamily, modality: str, pixels: Any, arguments: Mapping[str, Any]) -> FeatureCall:
        sizes = {name: arguments.get(name) for name in family.size_arguments}
        return cls(modality, sizes, _shape_of(pixels))


def _shape_of(pixels: Any) -> tuple[Any, ...] | None:
    if isinstance(pixels, (list, tuple)):
        return tuple(tuple(part.shape) for part in pixels)
    return tuple(pixels.shape) if isinstance(pixels, Tensor) else None


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


@dataclass(frozen=True)
class RoutedInstruction:
    """The instruction for every part of one projector input."""

    layout: MediaLayout
    rows: Tensor  # [media], rows of the instruction
    #: Name of the adapter that the instruction is encoded for.
    adapter: str
    instruction: InstructionTokens
    modality: str = "image"

    @property
    def unchecked_tokens(self) -> tuple[str, int] | None:
        """Modality and placeholders that only the projector's output can be checked against; None where its input
        told how many tokens its media take."""
        return (self.modality, sum(self.layout.tokens)) if self.layout.tokens_from_prompt else None

    def align(self, alignment: EmmaAlignment, visual_tokens: Tensor) -> Tensor:
        layout = self.layout
        per_medium = torch.as_tensor(layout.entries, device=self.rows.device)
        rows = self.rows.repeat_interleave(per_medium, output_size=sum(layout.entries))
        if layout.grids is None:
            own = self.instruction.of_rows(rows)
            return _laid_out_like(visual_tokens, alignment(visual_tokens, own.tokens, own.mask))
        flat = visual_tokens.reshape(-1, visual_tokens.shape[-1])
        packing = Packing(layout.grids, rows, layout.orders)
        aligned = alignment(flat, self.instruction.tokens, self.instruction.mask, packing=packing)
        return _laid_out_like(visual_tokens, aligned.view_as(visual_tokens))


@dataclass(frozen=True, eq=False)
class ObservedAlignment:
    """What an adapter did to the input of one projector, told to whoever observes the call."""

    #: Which of the model's projectors it is; see ``attachment``.
    place: str
    route: RoutedInstruction
    call: ProjectorCall
    visual_tokens: Tensor
    aligned: Tensor


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


def same_route(one: RoutedInstruction | Bypass, other: RoutedInstruction | Bypass) -> bool:
    """Whether both lead the same visual tokens to the same instructions."""
    if isinstance(one, Bypass) or isinstance(other, Bypass):
        return one == other
    return (
        one.adapter == other.adapter and torch.equal(one.rows, other.rows) and one.instruction.equals(other.instruction)
    )


def _laid_out_like(visual_tokens: Tensor, aligned: Tensor) -> Tensor:
    """The projector rounds otherwise for another memory layout, and an untrained adapter must not change a bit. LLaVA's
    visual tokens, for one, are a part of a larger tensor, which begins with the class token."""
    if aligned.stride() == visual_tokens.stride():
        return aligned
    return torch.empty_strided(
        visual_tokens.shape, visual_tokens.stride(), dtype=aligned.dtype, device=aligned.device
    ).copy_(aligned)


def route(
    family: ModelFamily, plan: CallPlan, feature_call: FeatureCall | None, visual_tokens: Tensor
) -> RoutedInstruction:
    """Which instruction each part of a projector input meets.

    Raises:
        RoutingError: if images, visual tokens and placeholders don't match.
    """
    assert plan.inner is not None
    running = plan.feature_call if feature_call is None else feature_call
    placeholders = plan.placeholders[running.modality]
    layout = _checked_layout(family, projector_call(plan.inner, running, visual_tokens, placeholders))
    rows = rows_of_media(placeholders, layout.tokens, repeats=plan.repeats, modality=running.modality)
    return RoutedInstruction(layout, rows, plan.adapter, plan.instruction, running.modality)


def route_without_prompt(
    family: ModelFamily,
    inner: nn.Module,
    adapter: str,
    instruction: InstructionTokens,
    feature_call: FeatureCall | None,
    visual_tokens: Tensor,
) -> RoutedInstruction:
    """One instruction for all images, or one for each, outside of any call."""
    running = feature_call or FeatureCall.of(family, family.modalities[0], None, {})
    layout = _checked_layout(family, projector_call(inner, running, visual_tokens, None))
    media = len(layout.tokens)
    rows = torch.arange(media, device=visual_tokens.device)
    return RoutedInstruction(
        layout, rows, adapter, instruction.for_each(media, f"{running.modality}s"), running.modality
    )


def projector_call(
    inner: nn.Module, running: FeatureCall, visual_tokens: Tensor, placeholders: Tensor | None
) -> ProjectorCall:
    return ProjectorCall(
        inner=inner,
        modality=running.modality,
        visual_tokens=visual_tokens,
        sizes=running.sizes,
        pixel_shape=running.pixel_shape,
        placeholders=placeholders,
    )


def check_tokens(modality: str, placeholders: int, projected: Tensor) -> None:
    """Check that a projector put out one token for each placeholder.

    Args:
        modality: of what it projected.
        placeholders: of the prompts.
        projected: output of the projector, ``[..., D]``.

    Raises:
        RoutingError: if it didn't: the prompt holds placeholders of images that are not of this call, and its own may
            have met the instruction of another row.
    """
    found = projected.shape[:-1].numel()
    if found != placeholders:
        raise RoutingError(
            f"{mismatch(modality, placeholders, found)}. Let the model's processor make text and images together, "
            "and let nothing cut them off (max_length, truncation). If a cache holds earlier turns of the prompt, pass "
            "it to generate as an argument of its own"
        )


def _checked_layout(family: ModelFamily, call: ProjectorCall) -> MediaLayout:
    layout = family.layout(call)
    shape = call.visual_tokens.shape
    grids = layout.grids
    announced, found = sum(layout.entries), shape[0]
    if layout.packed:
        if grids is None or len(grids) != announced:
            raise RoutingError(f"the layout of {type(family).__name__} is packed and must name the grid of each entry")
        announced, found = sum(height * width for height, width in grids), shape[:-1].numel()
    if announced != found:
        raise RoutingError(
            f"the call announces {announced} {'visual tokens' if layout.packed else 'images, tiles or frames'}, but "
            f"the projector got {found}: pass on everything that the model's processor returns"
        )
    return layout
