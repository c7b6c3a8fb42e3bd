"""What a patched model remembers: the adapter's parts, and, per thread, the call it is in."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from .calls import CallPlan, FeatureCall, OuterCall, PinnedPrompt, RoutedInstruction
from .config import EmmaConfig
from .errors import InstructionError, PatchError
from .families import ModelFamily
from .instructions.tokens import InstructionPipeline, InstructionTokens

#: Attribute of the outer model, the inner model and the projectors of a patched model.
STATE_ATTRIBUTE = "_emma"
#: Name of the adapter that ``patch_model`` makes.
DEFAULT = "default"


@dataclass
class NamedAdapter:
    """One of the adapters of a patched model: everything of it but its modules, which are part of the model."""

    config: EmmaConfig
    pipeline: InstructionPipeline
    #: Copies of the projectors as they were before training, once they are trained with the adapter.
    original_projectors: dict[str, nn.Module] = field(default_factory=dict)
    #: What the adapter's training made of the projectors, while another adapter is active.
    parked_projectors: dict[str, Tensor] = field(default_factory=dict)


class CallContext(threading.local):
    """Fields of the call that the current thread is in."""

    def __init__(self) -> None:
        self.outer: OuterCall | None = None
        self.plan: CallPlan | None = None
        self.feature_call: FeatureCall | None = None
        #: The prompt of a running ``generate`` and its instruction.
        self.pinned: PinnedPrompt | None = None
        #: The instructions of running ``with adapter.instruction(...)``, the innermost last, and the adapter that they
        #: were encoded for. Asynchronous code may leave them in another order than it entered them.
        self.all_named: list[tuple[str, InstructionTokens]] = []
        self.disabled = 0
        #: True until a call without images has its adapter parameters in its graph; see ``parallel``.
        self.ties_embeddings = False
        #: True while a ``generate`` without images runs.
        self.generates_without_images = False


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
    """One per patched model; shared by its outer model, inner model and projectors.

    Holds the model weakly, so that nothing keeps a deleted model alive. Copies and pickles carry the
    adapter's parts, never a call.
    """

    def __init__(
        self, family: ModelFamily, config: EmmaConfig, pipeline: InstructionPipeline, model: nn.Module
    ) -> None:
        self.family = family
        self.adapters = {DEFAULT: NamedAdapter(config, pipeline)}
        self.active = DEFAULT
        #: True once everything but the adapter is frozen: checkpoints then hold the adapter only.
        self.adapter_only = False
        #: What transformers itself leaves out of saves, while ``adapter_only`` replaces it.
        self.ignored_on_save: set[str] | None = None
        #: Which parameters of the model were trainable before ``train_only``.
        self.trainable_before: dict[str, bool] | None = None
        #: True once a call that trains the model was seen.
        self.seen_training = False
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

    @property
    def current(self) -> NamedAdapter:
        """The active adapter."""
        return self.adapters[self.active]

    @property
    def config(self) -> EmmaConfig:
        return self.current.config

    @property
    def pipeline(self) -> InstructionPipeline:
        return self.current.pipeline

    @property
    def named_instruction(self) -> InstructionTokens | None:
        """The instruction of the innermost ``with adapter.instruction(...)`` of this thread.

        Raises:
            InstructionError: if it was encoded for an adapter that is no longer the active one.
        """
        if not self.context.all_named:
            return None
        adapter, instruction = self.context.all_named[-1]
        if adapter != self.active:
            raise InstructionError(
                f"this call is inside of an adapter.instruction(...) that was entered for adapter {adapter!r}, and now "
                f"{self.active!r} is active: call set_active() before adapter.instruction()"
            )
        return instruction

    @property
    def model(self) -> nn.Module:
        """Raises:
        PatchError: if only a part of the patched model still exists.
        """
        model = self._model()
        if model is None:
            raise PatchError("the patched model was deleted, and only a part of it was kept; keep the model itself")
        return model

    @contextmanager
    def generating(self, plan: CallPlan, prompt: Tensor | None) -> Iterator[None]:
        """The context of a ``generate`` whose prompt gave this plan, and afterwards the one before it again."""
        context = self.context
        before = (context.outer, context.plan, context.pinned)
        context.outer, context.plan, context.pinned = None, plan, PinnedPrompt(plan.adapter, plan.instruction, prompt)
        try:
            yield
        finally:
            context.outer, context.plan, context.pinned = before

    @contextmanager
    def generating_without_images(self) -> Iterator[None]:
        context = self.context
        before, context.generates_without_images = context.generates_without_images, True
        try:
            yield
        finally:
            context.generates_without_images = before

    @contextmanager
    def encoding(self, feature_call: FeatureCall) -> Iterator[None]:
        """The context of a running feature method. The outermost counts: some models encode videos as images."""
        context = self.context
        if context.feature_call is not None:
            yield
            return
        context.feature_call = feature_call
        try:
            yield
        finally:
            context.feature_call = None

    @contextmanager
    def naming(self, instruction: InstructionTokens) -> Iterator[None]:
        named = self.context.all_named
        named.append((self.active, instruction))
        try:
            yield
        finally:
            del named[next(i for i, (_, other) in enumerate(named) if other is instruction)]

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
