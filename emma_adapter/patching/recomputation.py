"""What hooks and guards remember of a call, and recall where gradient checkpointing computes it again for backward.

A call that is computed again, or a part of one, must meet the instruction that it was first made with, whatever blocks
its thread is in by then.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..modules.gradient_checkpointing import is_recomputing, may_be_recomputed, with_own_memory
from .call_plan import Bypass, CallPlan
from .routing import RoutedInstruction
from .state import AdapterState


def enter_call(state: AdapterState, module: nn.Module, kwargs: dict[str, Any]) -> None:
    """Remember the scope of a call that may be computed again, and recall it where one is."""
    context, prompt = state.context, _prompt_name(kwargs)
    context.recomputed = None
    context.may_be_recomputed = may_be_recomputed(module)
    if not state.has_blocks or prompt is None or torch.compiler.is_compiling():
        return
    if not is_recomputing():
        state.memories.scopes.remember(kwargs[prompt], state.scope)
    elif (scope := state.memories.scopes.recall(kwargs[prompt])) is not None:
        context.recomputed = (module, scope)


def leave_call(state: AdapterState, module: nn.Module) -> None:
    context = state.context
    if context.recomputed is not None and context.recomputed[0] is module:
        context.recomputed = None


def own_prompt(state: AdapterState, kwargs: dict[str, Any]) -> None:
    """Give a call that may be computed again a prompt of its own, by which it will be recognised."""
    if state.context.may_be_recomputed and (prompt := _prompt_name(kwargs)):
        kwargs[prompt] = with_own_memory(kwargs[prompt])


def resume_call(state: AdapterState, inner: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Return whether this call of the inner model is computed again; its first plan is the running one then."""
    if not is_recomputing() or (prompt := _prompt_name(kwargs)) is None:
        return False
    plan = state.memories.plans.recall(kwargs[prompt])
    if plan is not None:
        state.resume(inner, plan)
    return plan is not None


def remember_plan(state: AdapterState, plan: CallPlan | Bypass, kwargs: dict[str, Any]) -> None:
    """Remember the plan of a call that may be computed again, in part too: its pixels are made its own."""
    if not state.context.may_be_recomputed:
        return
    if prompt := _prompt_name(kwargs):
        state.memories.plans.remember(kwargs[prompt], _kept(plan))
    for modality in state.family.modalities:
        name = state.family.pixel_arguments[modality]
        if kwargs.get(name) is not None:
            kwargs[name] = with_own_memory(kwargs[name])


def call_of_features(state: AdapterState, inner: nn.Module, pixels: Any) -> AbstractContextManager[None]:
    """Return a context that restores the plan or scope of a feature method that is computed again outside its call."""
    context, memory = state.context, state.memories.features
    pixels = next(iter(pixels), None) if isinstance(pixels, (list, tuple)) else pixels
    if not isinstance(pixels, Tensor) or context.feature_call is not None:
        return nullcontext()
    if not is_recomputing():
        if context.plan is None and may_be_recomputed(inner):
            memory.remember(pixels, state.scope)
        elif context.plan is not None and context.pinned is None and context.may_be_recomputed:
            memory.remember(pixels, _kept(context.plan))
    elif context.plan is None and context.recomputed is None:
        remembered = memory.recall(pixels)
        if remembered is not None:
            return state.recomputing(inner, remembered)
    return nullcontext()


def remembered_route(
    state: AdapterState,
    projector: nn.Module,
    visual_tokens: Tensor,
    make: Callable[[AdapterState, nn.Module, Tensor], RoutedInstruction | Bypass],
) -> RoutedInstruction | Bypass:
    """Return the route of a projector's input: the one it was first given, or a new one, which may be remembered."""
    if is_recomputing() and (remembered := state.memories.routes.recall(visual_tokens)) is not None:
        return remembered
    routed = make(state, projector, visual_tokens)
    # Reentrant checkpointing of a frozen projector records no gradients, and only the input shows it.
    if state.context.may_be_recomputed or may_be_recomputed(projector) or visual_tokens.requires_grad:
        state.memories.routes.remember(visual_tokens, routed)
    return routed


def _kept(plan: CallPlan | Bypass) -> CallPlan | Bypass:
    return plan.without_model() if isinstance(plan, CallPlan) else plan


def _prompt_name(kwargs: dict[str, Any]) -> str | None:
    return next((name for name in ("input_ids", "inputs_embeds") if isinstance(kwargs.get(name), Tensor)), None)
