"""The state of a patched model: its adapters and, per thread, the call it is in."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..alignment.config import EmmaConfig
from ..errors import InstructionError, PatchError
from ..instructions.pipeline import InstructionPipeline, InstructionTokens
from ..models.families import ModelFamily
from ..models.feature_calls import FeatureCall
from ..modules.gradient_checkpointing import is_recomputing
from ..modules.method_guard import STATE_ATTRIBUTE
from ..modules.per_thread import PerThread
from ..modules.private import cache_names_to_bridge
from .attached_adapter import AttachedAdapter
from .call_context import CallContext, Memories
from .call_plan import Bypass, CallPlan, PinnedPrompt
from .context_managers import Block, BlockOwner, Scope, current_scope, entered
from .routing import ObservedAlignment
from .sites import DEFAULT

_OUTSIDE = Scope()


class AdapterState:
    """The state of one patched model, shared by its outer model, inner model and projectors.

    Holds the model weakly, so that nothing keeps a deleted model alive. Copies and pickles carry the adapters, never a
    call.
    """

    def __init__(
        self, family: ModelFamily, config: EmmaConfig, pipeline: InstructionPipeline, model: nn.Module
    ) -> None:
        self.family = family
        self.adapters = {DEFAULT: AttachedAdapter(self, DEFAULT, config, pipeline)}
        #: Name of the adapter that is active in all threads.
        self.chosen = DEFAULT
        #: Name of the frozen adapter that reference passes go through, if one is kept for them.
        self.reference: str | None = None
        #: True while PEFT's own frozen copy, the reference of a LoRA, is in use.
        self.in_reference = False
        #: By name, whether each parameter of the model was trainable before ``train_only``; None without it.
        self.trainable_before: dict[str, bool] | None = None
        #: The float32 weights of the adapters, by the ``id`` of their parameters, if the model is quantized.
        self.float32_weights: dict[int, Tensor] = {}
        #: True once a call that trains the model was seen.
        self.seen_training = False
        #: Names under which transformers passes arguments, and those under which the model takes them; see ``private``.
        self.bridged_arguments = cache_names_to_bridge(type(model))
        self._contexts = PerThread(CallContext)
        self.memories = Memories()
        self._owner = BlockOwner()
        #: True once a block was entered. Until then calls needn't look for one, which not every compiler can trace.
        self._has_blocks = False
        #: In a replica, which runs in another thread: the scope of the call that it was made for.
        self._inherited: Scope | None = None
        self._model = weakref.ref(model)

    @property
    def context(self) -> CallContext:
        """What is known of the call that the current thread is in."""
        return self._contexts.value

    def __getstate__(self) -> dict[str, Any]:
        transient = ("_contexts", "memories", "_owner", "_has_blocks", "_inherited", "in_reference")
        lasting = {key: value for key, value in self.__dict__.items() if key not in transient}
        return lasting | {"float32_weights": {}, "_model": self._model()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, memories=Memories(), _model=weakref.ref(state["_model"]))
        self._contexts = PerThread(CallContext)
        self._owner, self._has_blocks, self._inherited = BlockOwner(), False, None
        self.in_reference = False

    def for_replica(self) -> AdapterState:
        """Return the same state, for a copy of a module that will run this thread's call in another thread."""
        replica = object.__new__(type(self))
        replica.__dict__.update(self.__dict__, _inherited=self.scope)
        return replica

    def __deepcopy__(self, memo: dict[int, Any]) -> AdapterState:
        if id(self._model()) not in memo:
            # A part alone is copied, as PEFT copies a projector that it trains: the copy belongs to this model.
            return self
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__({key: copy.deepcopy(value, memo) for key, value in self.__getstate__().items()})
        return copied

    @property
    def active(self) -> str:
        """Name of the adapter that calls go through, in this thread and the blocks it is in."""
        if (name := self.scope.adapter) is not None:
            return name
        return self.reference if self.in_reference and self.reference is not None else self.chosen

    @active.setter
    def active(self, name: str) -> None:
        self.chosen = name

    @property
    def current(self) -> AttachedAdapter:
        """The active adapter."""
        return self.adapters[self.active]

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters of all adapters, their own projectors' included."""
        return [parameter for adapter in self.adapters.values() for parameter in adapter.parameters()]

    @property
    def config(self) -> EmmaConfig:
        return self.current.config

    @property
    def pipeline(self) -> InstructionPipeline:
        return self.current.pipeline

    @property
    def has_blocks(self) -> bool:
        """True once a block of this model was entered."""
        return self._has_blocks

    @property
    def scope(self) -> Scope:
        """The combined effect of the blocks that the current call is in or, if it is computed again, was in."""
        if self._inherited is not None:
            return self._inherited
        if self.context.recomputed is not None and is_recomputing():
            return self.context.recomputed[1]
        return current_scope(self._owner) if self._has_blocks else _OUTSIDE

    @property
    def named_instruction(self) -> InstructionTokens | None:
        """The instruction of the innermost ``with adapter.instruction(...)``.

        Raises:
            InstructionError: if it was encoded for an adapter that is no longer the active one.
        """
        block = self.scope.named
        if block is None:
            return None
        if block.adapter != self.active:
            raise InstructionError(
                "this call is inside of an adapter.instruction(...) that was entered for adapter "
                f"{block.adapter!r}, and now {self.active!r} is active: call set_adapter() before adapter.instruction()"
            )
        return block.instruction

    @property
    def model(self) -> nn.Module:
        """The patched model.

        Raises:
            PatchError: if only a part of it still exists.
        """
        model = self._model()
        if model is None:
            raise PatchError("the patched model was deleted, and only a part of it was kept; keep the model itself")
        return model

    @contextmanager
    def generating(self, plan: CallPlan, prompt: Tensor | None) -> Iterator[None]:
        """Set the context of a ``generate`` whose prompt gave this plan, and restore the previous one afterwards."""
        context = self.context
        previous = (context.outer, context.plan, context.pinned)
        context.outer, context.plan, context.pinned = None, plan, PinnedPrompt(plan, prompt)
        try:
            yield
        finally:
            context.outer, context.plan, context.pinned = previous

    @contextmanager
    def generating_without_images(self) -> Iterator[None]:
        context = self.context
        previous, context.generates_without_images = context.generates_without_images, True
        try:
            yield
        finally:
            context.generates_without_images = previous

    @contextmanager
    def observing(self, observer: Callable[[ObservedAlignment], None]) -> Iterator[None]:
        """Report the calls that this thread makes in the block to ``observer``; the model gets no further hook."""
        context = self.context
        previous, context.observer = context.observer, observer
        try:
            yield
        finally:
            context.observer = previous

    @contextmanager
    def encoding(self, feature_call: FeatureCall) -> Iterator[None]:
        """Set the context of a running feature method. The outermost counts: some models encode videos as images."""
        context = self.context
        if context.feature_call is not None:
            yield
            return
        context.feature_call, context.before = feature_call, {}
        try:
            yield
        finally:
            context.feature_call = None

    @contextmanager
    def recomputing(self, module: nn.Module, plan: CallPlan | Bypass | Scope) -> Iterator[None]:
        """Set the context of a part of a call that is computed again outside of it."""
        context = self.context
        previous = (context.plan, context.recomputed)
        self.resume(module, plan)
        try:
            yield
        finally:
            context.plan, context.recomputed = previous

    def resume(self, module: nn.Module, plan: CallPlan | Bypass | Scope) -> None:
        """Make a remembered plan or scope that of the call which ``module``, the inner model, is in."""
        if isinstance(plan, Scope):
            self.context.recomputed = (module, plan)
        else:
            self.context.plan = replace(plan, inner=module) if isinstance(plan, CallPlan) else plan
            self.context.recomputed = (module, Scope(disabled=isinstance(plan, Bypass)))

    def naming(self, instruction: InstructionTokens) -> AbstractContextManager[None]:
        self._has_blocks = True
        return entered(Block(self._owner, self.active, instruction))

    def using(self, adapter: str) -> AbstractContextManager[None]:
        """Have the calls of this thread or task, in the block, go through another adapter."""
        self._has_blocks = True
        return entered(Block(self._owner, self.active, None, uses=adapter))

    def disabled(self) -> AbstractContextManager[None]:
        self._has_blocks = True
        return entered(Block(self._owner, self.active, None))


def state_of(model: nn.Module) -> AdapterState:
    """Return the state of a patched model, or of a part of one.

    Raises:
        PatchError: if the model is not patched.
    """
    state = getattr(model, STATE_ATTRIBUTE, None)
    if not isinstance(state, AdapterState):
        raise PatchError(f"this {type(model).__name__} is not patched; call patch_model(model) first")
    return state
