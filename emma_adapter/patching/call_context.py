"""What a thread knows of the call it is in, and what is remembered of calls that backward may compute again."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ..models.feature_calls import FeatureCall
from ..modules.gradient_checkpointing import RecomputationMemory
from .call_plan import Bypass, CallPlan, GivenPrompt, OuterCall, PinnedPrompt, same_plan
from .context_managers import Scope
from .routing import Before, ObservedAlignment, RoutedInstruction, same_route


class CallContext:
    """What is known of the call that the current thread is in."""

    def __init__(self) -> None:
        self.outer: OuterCall | None = None
        #: The prompt given to a wrapper that puts virtual tokens before it, until the model's call takes it.
        self.given: GivenPrompt | None = None
        self.plan: CallPlan | Bypass | None = None
        #: The inner model whose call ``plan`` is for.
        self.caller: nn.Module | None = None
        self.feature_call: FeatureCall | None = None
        #: The prompt of a running ``generate``, and its plan.
        self.pinned: PinnedPrompt | None = None
        #: True if a backward may compute the running call again.
        self.may_be_recomputed = False
        #: While a call is computed again for backward: the module it began with, and the scope it was first made in.
        self.recomputed: tuple[nn.Module, Scope] | None = None
        #: What the calls of each projector took in the running pass, by place and modality.
        self.before: dict[tuple[str, str], Before] = {}
        #: The instructions that the running projector's input meets.
        self.route: RoutedInstruction | Bypass | None = None
        #: True if the next embedding is to be tied to the adapter's parameters; see ``without_images``.
        self.ties_embeddings = False
        #: True while a ``generate`` without images runs.
        self.generates_without_images = False
        #: Called with what the adapter does to each projector input, while the call is analysed.
        self.observer: Callable[[ObservedAlignment], None] | None = None


class Memories:
    """What recomputation needs of earlier calls, keyed by the tensor that a part of the model was given."""

    def __init__(self) -> None:
        #: The scope of a call, by its token ids.
        self.scopes: RecomputationMemory[Scope] = RecomputationMemory(Scope.means)
        #: The plan of a call, by the token ids that the inner model was given.
        self.plans: RecomputationMemory[CallPlan | Bypass] = RecomputationMemory(same_plan)
        #: The plan of a call, or outside of any call the scope, by pixels.
        self.features: RecomputationMemory[CallPlan | Bypass | Scope] = RecomputationMemory(_same_features)
        #: The instructions that a projector's input meets, by visual tokens.
        self.routes: RecomputationMemory[RoutedInstruction | Bypass] = RecomputationMemory(same_route)


def _same_features(one: CallPlan | Bypass | Scope, other: CallPlan | Bypass | Scope) -> bool:
    if isinstance(one, Scope) or isinstance(other, Scope):
        return isinstance(one, Scope) and isinstance(other, Scope) and one.means(other)
    return same_plan(one, other)
