"""What is known, in one thread, of the call that it is in; and what was known of calls that backward computes again."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ..models.feature_calls import FeatureCall
from ..modules.gradient_checkpointing import RecomputationMemory
from .call_plan import Bypass, CallPlan, GivenPrompt, OuterCall, PinnedPrompt, same_plan
from .context_managers import Scope
from .routing import ObservedAlignment, RoutedInstruction, same_route


class CallContext:
    """Fields of the call that the current thread is in."""

    def __init__(self) -> None:
        self.outer: OuterCall | None = None
        #: What a wrapper was given that puts virtual tokens before the prompt, until the model's call takes it.
        self.given: GivenPrompt | None = None
        self.plan: CallPlan | Bypass | None = None
        #: The inner model whose call the plan is of.
        self.caller: nn.Module | None = None
        self.feature_call: FeatureCall | None = None
        #: The prompt of a running ``generate`` and its instruction.
        self.pinned: PinnedPrompt | None = None
        #: Whether a backward may follow the running call.
        self.may_be_recomputed = False
        #: Of a call that is computed again for backward: the module it began with, and the scope it was made in.
        self.recomputed: tuple[nn.Module, Scope] | None = None
        #: Of a running projector.
        self.route: RoutedInstruction | Bypass | None = None
        #: True until a call without images has its adapter parameters in its graph; see ``without_images``.
        self.ties_embeddings = False
        #: True while a ``generate`` without images runs.
        self.generates_without_images = False
        #: Told what the adapter does to each projector input, while somebody analyses the call.
        self.observer: Callable[[ObservedAlignment], None] | None = None


class Memories:
    """For recomputation, by the tensor that a part of the model was given."""

    def __init__(self) -> None:
        #: By token ids: the scope of a call.
        self.scopes: RecomputationMemory[Scope] = RecomputationMemory(Scope.means)
        #: By the token ids that the inner model was given: the plan of the call.
        self.plans: RecomputationMemory[CallPlan | Bypass] = RecomputationMemory(same_plan)
        #: By pixels: the plan of the call, or outside of one the scope.
        self.features: RecomputationMemory[CallPlan | Bypass | Scope] = RecomputationMemory(_same_features)
        #: By visual tokens.
        self.routes: RecomputationMemory[RoutedInstruction | Bypass] = RecomputationMemory(same_route)


def _same_features(one: CallPlan | Bypass | Scope, other: CallPlan | Bypass | Scope) -> bool:
    if isinstance(one, Scope) or isinstance(other, Scope):
        return isinstance(one, Scope) and isinstance(other, Scope) and one.means(other)
    return same_plan(one, other)
