"""What a patched model remembers: the adapter's parts, and, per thread, the call it is in."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from .alignment import EmmaAlignment
from .config import EmmaConfig
from .errors import InstructionError, PatchError, RoutingError
from .families import MediaLayout, ModelFamily
from .instructions.extraction import Prompt
from .instructions.routing import rows_of_media
from .instructions.tokens import Instruction, InstructionPipeline, InstructionTokens, embedder

#: Attribute of the outer model, the inner model and the projector of a patched model.
STATE_ATTRIBUTE = "_emma"
#: Name of the adapter as a submodule of the projector.
ALIGNMENT_NAME = "emma"


@dataclass(frozen=True)
class OuterCall:
    """What only the outer model's call tells."""

    labels: Tensor | None = None
    instruction: Instruction | None = None
    instruction_mask: Tensor | None = None


@dataclass(frozen=True)
class CallPlan:
    """What the projector's hook needs to know of the call it is in. Sizes only: pixels must not be kept alive."""

    inner: nn.Module
    instruction: InstructionTokens
    #: For each modality, placeholder tokens per row ``[B]``.
    placeholders: Mapping[str, Tensor]
    sizes: Mapping[str, Any]
    #: Rows of the call for each row of the instruction: generation repeats rows for beams.
    repeats: int = 1
    modality: str = "image"


@dataclass(frozen=True)
class RoutedInstruction:
    """The instruction for every part of one projector input."""

    layout: MediaLayout
    rows: Tensor  # [media], rows of the instruction
    instruction: InstructionTokens

    def align(self, alignment: EmmaAlignment, visual_tokens: Tensor) -> Tensor:
        units = list(self.layout.units)
        if not self.layout.packed:
            repeats = torch.as_tensor(units, device=self.rows.device)
            entries = self.instruction.of_rows(self.rows.repeat_interleave(repeats, output_size=sum(units)))
            return alignment(visual_tokens, entries.tokens, entries.mask)
        aligned = []
        for i, segment in enumerate(visual_tokens.split(units, dim=1)):
            own = self.instruction.of_rows(self.rows[i : i + 1])
            grid = None if self.layout.grids is None else self.layout.grids[i]
            aligned.append(alignment(segment, own.tokens, own.mask, grid=grid))
        return torch.cat(aligned, dim=1)


class CallContext(threading.local):
    """Fields of the call that the current thread is in."""

    def __init__(self) -> None:
        self.outer: OuterCall | None = None
        self.plan: CallPlan | None = None
        #: The instruction of a running ``generate``, read from its prompt.
        self.pinned: InstructionTokens | None = None
        #: The instruction of a running ``with adapter.instruction(...)``.
        self.named: InstructionTokens | None = None
        self.disabled = 0


class RecomputationMemory:
    """Finds the instruction of a projector input again when a checkpointed projector is recomputed in backward.

    Recomputation may run in another thread and long after other calls, so the instruction is bound to what the
    recomputation shares with the call: the storage of the projector's input. A weak reference to a storage keeps
    its address from being used again, which makes the address a safe key.
    """

    def __init__(self) -> None:
        self._entries: dict[int, tuple[StorageWeakRef, RoutedInstruction | None]] = {}
        self._lock = threading.Lock()

    def remember(self, visual_tokens: Tensor, routed: RoutedInstruction | None) -> None:
        """``None`` remembers that the adapter was disabled."""
        reference = StorageWeakRef(visual_tokens.untyped_storage())
        with self._lock:
            for key in [key for key, (other, _) in self._entries.items() if other.expired()]:
                del self._entries[key]
            self._entries[reference.cdata] = (reference, routed)

    def recall(self, visual_tokens: Tensor) -> tuple[bool, RoutedInstruction | None]:
        """Whether this input was seen, and with what."""
        key = visual_tokens.untyped_storage()._cdata
        with self._lock:
            entry = self._entries.get(key)
        return (False, None) if entry is None else (True, entry[1])


class AdapterState:
    """One per patched model; shared by its outer model, inner model and projector.

    Holds the model weakly, so that nothing keeps a deleted model alive. Copies and pickles carry the
    adapter's parts, never a call.
    """

    def __init__(
        self, family: ModelFamily, config: EmmaConfig, pipeline: InstructionPipeline, model: nn.Module
    ) -> None:
        self.family = family
        self.config = config
        self.pipeline = pipeline
        #: A copy of the projector as it was before training, once the projector is trained with the adapter.
        self.original_projector: nn.Module | None = None
        #: True once everything but the adapter is frozen: checkpoints then hold the adapter only.
        self.adapter_only = False
        #: What transformers itself leaves out of saves, while ``adapter_only`` replaces it.
        self.ignored_on_save: set[str] | None = None
        #: Which parameters of the model were trainable before ``train_only``.
        self.trainable_before: dict[str, bool] | None = None
        self.context = CallContext()
        self.memory = RecomputationMemory()
        self._model = weakref.ref(model)

    def __getstate__(self) -> dict[str, Any]:
        kept = {key: value for key, value in self.__dict__.items() if key not in ("context", "memory")}
        return {**kept, "_model": self._model()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(
            state, context=CallContext(), memory=RecomputationMemory(), _model=weakref.ref(state["_model"])
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> AdapterState:
        if id(self._model()) not in memo:
            # A part of the model is copied, as PEFT copies a projector that it trains: it stays part of this model.
            return self
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__({key: copy.deepcopy(value, memo) for key, value in self.__getstate__().items()})
        return twin

    def has_pixels(self, arguments: Mapping[str, Any]) -> bool:
        return any(arguments.get(name) is not None for names in self.family.pixel_arguments.values() for name in names)

    def sizes(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        return {name: arguments.get(name) for name in self.family.size_arguments}

    def placeholders(
        self, inner: nn.Module, input_ids: Tensor | None, inputs_embeds: Tensor | None
    ) -> dict[str, Tensor]:
        """Placeholder tokens per row ``[B]``, for each modality."""
        counts = {}
        for modality in self.family.pixel_arguments:
            token_id = self.family.placeholder_id(inner, modality)
            if input_ids is not None:
                counts[modality] = (input_ids == token_id).sum(dim=1)
            elif inputs_embeds is not None:
                # As transformers does it: a placeholder is where the embedding equals the placeholder's.
                one = embedder(inner)(torch.tensor([token_id], device=inputs_embeds.device))
                counts[modality] = (inputs_embeds == one).all(dim=-1).sum(dim=1)
            else:
                raise RoutingError("a call with images needs input_ids or inputs_embeds")
        return counts

    def instruction_tokens(
        self,
        inner: nn.Module,
        outer: OuterCall,
        placeholders: Mapping[str, Tensor],
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Any,
    ) -> InstructionTokens:
        """The call's instruction, explicit or inferred: one row per row of the call.

        Raises:
            InstructionError: if it can't be known.
        """
        embed = embedder(inner)
        reference = input_ids if input_ids is not None else inputs_embeds
        assert reference is not None
        rows = reference.shape[0]
        if outer.instruction is None and self.context.named is not None:
            return self.context.named.for_each(rows, "rows")
        if outer.instruction is not None:
            return self.pipeline.explicit(outer.instruction, outer.instruction_mask, rows, embed, reference.device)
        if input_ids is None:
            raise InstructionError(
                "the instruction can't be read from inputs_embeds; pass it: "
                'model(**inputs, instruction=["…", …]), or the same with generate'
            )
        prompt = Prompt(
            input_ids=input_ids,
            attention_mask=attention_mask if isinstance(attention_mask, Tensor) else None,
            labels=outer.labels,
            trains=inner.training and torch.is_grad_enabled(),
            has_media=torch.stack(list(placeholders.values())).sum(dim=0) > 0,
        )
        return self.pipeline.inferred(prompt, embed)

    def route(self, plan: CallPlan, visual_tokens: Tensor) -> RoutedInstruction:
        """Which instruction each part of a projector input meets.

        Raises:
            RoutingError: if images, visual tokens and placeholders don't match.
        """
        placeholders = plan.placeholders[plan.modality]
        layout = self.family.layout(plan.inner, plan.modality, visual_tokens, plan.sizes, int(placeholders.sum()))
        expected = visual_tokens.shape[1 if layout.packed else 0]
        if sum(layout.units) != expected:
            raise RoutingError(
                f"the call announces {sum(layout.units)} entries of visual tokens, but the projector got {expected}"
            )
        rows = rows_of_media(placeholders, layout.tokens) // plan.repeats
        return RoutedInstruction(layout, rows, plan.instruction)

    def route_without_prompt(self, instruction: InstructionTokens, visual_tokens: Tensor) -> RoutedInstruction:
        """One instruction for all images, or one for each, outside of any call."""
        images = visual_tokens.shape[0]
        rows = torch.arange(images, device=visual_tokens.device)
        layout = MediaLayout(tokens=[1] * images, units=[1] * images)
        return RoutedInstruction(layout, rows, instruction.for_each(images, "images"))

    @contextmanager
    def generating(self, plan: CallPlan) -> Iterator[None]:
        """The context of a ``generate`` whose prompt gave this plan, and afterwards the one before it again."""
        context = self.context
        before = (context.outer, context.plan, context.pinned)
        context.outer, context.plan, context.pinned = None, plan, plan.instruction
        try:
            yield
        finally:
            context.outer, context.plan, context.pinned = before

    @contextmanager
    def naming(self, instruction: InstructionTokens) -> Iterator[None]:
        before, self.context.named = self.context.named, instruction
        try:
            yield
        finally:
            self.context.named = before

    @contextmanager
    def disabled(self) -> Iterator[None]:
        self.context.disabled += 1
        try:
            yield
        finally:
            self.context.disabled -= 1


def state_of(model: nn.Module) -> AdapterState:
    """Raises:
    PatchError: if the model is not patched.
    """
    state = getattr(model, STATE_ATTRIBUTE, None)
    if not isinstance(state, AdapterState):
        raise PatchError(f"this {type(model).__name__} is not patched; call patch_model(model) first")
    return state
