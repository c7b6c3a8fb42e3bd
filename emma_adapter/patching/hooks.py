"""Hooks that intercept the calls of a patched model: on the outer model, the inner model and the projectors.

Hooks are functions of this module and find everything through the module they run on, so that a copy or a pickle of a
patched model is patched too, and independent. No class is changed.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..errors import InstructionError
from ..models.feature_calls import FeatureCall, projector_call
from ..models.projected_tokens import divided_as, joined
from ..modules import private
from ..modules.gradient_checkpointing import is_recomputing
from ..modules.gradients import with_zero_gradient
from ..modules.method_guard import STATE_ATTRIBUTE, first_tensor
from ..modules.sharding import execution_device, is_partitioned
from .call_plan import Bypass, CallPlan, GivenPrompt, OuterCall
from .planning import has_pixels, pinned_plan, plan_call
from .recomputation import enter_call, leave_call, own_prompt, remember_plan, remembered_route, resume_call
from .routing import Before, ObservedAlignment, RoutedInstruction, check_tokens, route, route_without_prompt
from .setup_checks import check_wrapped_once_patched, warn_if_left_out
from .sites import PLACE_ATTRIBUTE, alignment_at, is_aligned, own_projector_at, projector_parameters
from .state import AdapterState, state_of
from .without_images import after_embedding, before_call_without_images

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def install_call_hooks(model: nn.Module, inner: nn.Module) -> None:
    model.register_forward_pre_hook(before_outer, with_kwargs=True)
    inner.register_forward_pre_hook(before_inner, with_kwargs=True)
    inner.register_forward_hook(after_inner, with_kwargs=True, always_call=True)
    model.register_forward_hook(after_outer, with_kwargs=True, always_call=True)


def install_prompt_hooks(wrapper: nn.Module) -> None:
    """Install hooks on a ``PeftModel`` that puts virtual tokens before the prompt."""
    wrapper.register_forward_pre_hook(before_virtual_tokens, with_kwargs=True)
    wrapper.register_forward_hook(after_virtual_tokens, with_kwargs=True, always_call=True)


def install_projector_hooks(projector: nn.Module) -> None:
    projector.register_forward_pre_hook(before_projector, with_kwargs=True)
    projector.register_forward_hook(after_projector, with_kwargs=True)


def has_projector_hooks(projector: nn.Module) -> bool:
    return any(hook is before_projector for hook in private.pre_hooks(projector))


def remove_hooks(module: nn.Module) -> None:
    """Remove this library's hooks from ``module``, also from a copy of the module they were installed on."""
    our_hooks = (
        *(before_virtual_tokens, after_virtual_tokens, before_outer, after_outer, before_inner, after_inner),
        *(before_projector, after_projector, after_embedding),
    )
    private.remove_hooks(module, our_hooks)


def before_virtual_tokens(wrapper: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Note the prompt, since the model may get embeddings instead, which begin with those of the virtual tokens."""
    arguments = _by_name(wrapper, args, kwargs)
    ids = arguments.get("input_ids")
    if isinstance(ids, Tensor) and ids.ndim == 2 and hasattr(wrapper, STATE_ATTRIBUTE):
        prompt = GivenPrompt(ids, arguments.get("attention_mask"), arguments.get("labels"))
        state_of(wrapper).context.given = prompt


def after_virtual_tokens(wrapper: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    if hasattr(wrapper, STATE_ATTRIBUTE):
        state_of(wrapper).context.given = None


def before_outer(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """Take the adapter's arguments out of the call, and note the labels, which the inner model doesn't get."""
    kwargs = _by_name(model, args, kwargs)
    state = state_of(model)
    for passed_name, taken_name in state.bridged_arguments.items():
        if passed_name in kwargs:
            kwargs.setdefault(taken_name, kwargs.pop(passed_name))
    enter_call(state, model, kwargs)
    state.context.outer = pop_outer_call(kwargs)
    own_prompt(state, kwargs)
    return (), kwargs


def after_outer(model: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    state = state_of(model)
    state.context.outer = None
    leave_call(state, model)


def before_inner(inner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """Determine the instruction of every row before the vision tower runs."""
    kwargs = _by_name(inner, args, kwargs)
    # The adapter's arguments are still there if the outer model's hooks were bypassed, as by wrappers that call forward
    # themselves.
    passed_on = pop_outer_call(kwargs)
    state = state_of(inner)
    context = state.context
    # Removed as they are read: an interrupted call, whose later hooks never ran, must leave nothing to the next.
    outer, context.outer = context.outer, None
    given_prompt, context.given = context.given, None
    if outer is None:
        if resume_call(state, inner, kwargs):
            return (), kwargs
        enter_call(state, inner, kwargs)
        outer = passed_on
    elif passed_on.instruction is not None:
        outer = dataclasses.replace(
            outer, instruction=passed_on.instruction, instruction_mask=passed_on.instruction_mask
        )
    arguments = kwargs
    if given_prompt is not None and given_prompt.is_end_of(kwargs):
        outer = dataclasses.replace(outer, labels=given_prompt.labels)
        arguments = given_prompt.in_place_of(kwargs)
    context.caller, context.before = inner, {}
    disabled = state.scope.disabled
    if not has_pixels(state.family, kwargs):
        if not disabled and context.pinned is None:
            before_call_without_images(state, inner, kwargs)
        return (), kwargs
    if disabled:
        context.plan = Bypass(state.active)
    else:
        if inner.training and torch.is_grad_enabled():
            warn_if_left_out(state.model)
        context.plan = _plan(state, inner, outer, arguments)
    remember_plan(state, context.plan, kwargs)
    return (), kwargs


def after_inner(inner: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    state = state_of(inner)
    context = state.context
    context.ties_embeddings, context.caller = False, None
    leave_call(state, inner)
    context.plan = None if context.pinned is None else context.pinned.plan


def _plan(state: AdapterState, inner: nn.Module, outer: OuterCall, kwargs: dict[str, Any]) -> CallPlan:
    pinned = state.context.pinned
    if pinned is not None and outer.instruction is None and pinned.is_prompt_of(kwargs):
        return pinned_plan(state, inner, pinned, kwargs)
    return plan_call(state, inner, outer, kwargs)


def before_projector(projector: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
    """Replace the projector's input, the visual tokens, with aligned ones."""
    state = state_of(projector)
    found = first_tensor(args, kwargs)
    if found is None:
        state.context.route = None
        return None
    visual_tokens, put_back = found
    routed = state.context.route = remembered_route(state, projector, visual_tokens, _route)
    if isinstance(routed, Bypass):
        return None
    config = state.adapters[routed.adapter].config
    if config.aligns_projected or not is_aligned(config, projector):
        return None
    return put_back(_align(state, projector, routed, visual_tokens))


def _align(state: AdapterState, projector: nn.Module, routed: RoutedInstruction, visual_tokens: Tensor) -> Tensor:
    device = execution_device(projector)
    if device is not None:
        # accelerate does so too, but only after this hook.
        visual_tokens = visual_tokens.to(device)
    alignment = alignment_at(projector, routed.adapter)
    if not torch.compiler.is_compiling() and torch.distributed.is_available() and torch.distributed.is_initialized():
        check_wrapped_once_patched(alignment)
    aligned = routed.align(alignment, visual_tokens)
    if state.context.observer is not None:
        _tell_observer(state, projector, routed, visual_tokens, aligned)
    return aligned


def _tell_observer(
    state: AdapterState, projector: nn.Module, routed: RoutedInstruction, visual_tokens: Tensor, aligned: Tensor
) -> None:
    context, family = state.context, state.family
    assert context.observer is not None
    plan = context.plan if isinstance(context.plan, CallPlan) else None
    feature_call = context.feature_call or (
        plan.feature_call if plan else FeatureCall.of(family, family.modalities[0], None, {})
    )
    inner = family.inner(state.model)
    placeholders = plan.placeholders[feature_call.modality] if plan else None
    call = projector_call(inner, feature_call, visual_tokens, placeholders, routed.before.calls)
    context.observer(ObservedAlignment(getattr(projector, PLACE_ATTRIBUTE), routed, call, visual_tokens, aligned))


def after_projector(projector: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    """Replace the output with that of the adapter's own projector, if it has one, and align it if the config says so.

    Raises:
        RoutingError: if the images take other numbers of tokens than their rows were determined with, or an output that
            is to be aligned can't be divided into them.
    """
    state = state_of(projector)
    routed, state.context.route = state.context.route, None
    if routed is None or isinstance(routed, Bypass):
        return None
    if routed.unchecked_tokens is not None and isinstance(output, Tensor):
        check_tokens(*routed.unchecked_tokens, output)
    config = state.adapters[routed.adapter].config
    if not is_aligned(config, projector):
        return None
    own_projector = own_projector_at(projector, routed.adapter)
    if own_projector is None and not config.aligns_projected:
        return None
    tokens = joined(output)
    device = tokens.device
    if own_projector is not None:
        tokens = _used_by_all(projector, joined(own_projector(*args, **kwargs)))
    if config.aligns_projected:
        tokens = _align(state, projector, routed.of_projected(tokens), tokens)
    return divided_as(output, tokens.to(device))


def _used_by_all(projector: nn.Module, output: Tensor) -> Tensor:
    """Return an output with the trainable parameters of a projector in its graph, in place of which another ran.

    Processes that train together wait for their gradients.
    """
    if torch.compiler.is_compiling() or not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return output
    unused = [parameter for parameter in projector_parameters(projector).values() if parameter.requires_grad]
    return with_zero_gradient(output, [parameter for parameter in unused if not is_partitioned(parameter)])


def _route(state: AdapterState, projector: nn.Module, visual_tokens: Tensor) -> RoutedInstruction | Bypass:
    """Return the instructions for this projector input."""
    context = state.context
    _forget_interrupted_call(state)
    plan = context.plan
    if isinstance(plan, Bypass):
        return plan
    if state.scope.disabled:
        return Bypass(state.active)
    family = state.family
    modality = context.feature_call.modality if context.feature_call else family.modalities[0]
    calls = (getattr(projector, PLACE_ATTRIBUTE), modality)
    before = context.before.get(calls, Before())
    if plan is not None:
        routed = route(family, plan, context.feature_call, visual_tokens, before)
    elif (named := state.named_instruction) is not None:
        inner = family.inner(state.model)
        routed = route_without_prompt(family, inner, state.active, named, context.feature_call, visual_tokens, before)
    else:
        _raise_for_lack_of_an_instruction()
    if routed.layout.continues:
        context.before[calls] = before.and_then(routed.layout)
    return routed


def _raise_for_lack_of_an_instruction() -> NoReturn:
    if is_recomputing():
        raise InstructionError(
            "a checkpointed part of the vision side is computed again for backward, and it can't be told for which "
            "call: it was made before patch_model, or bypasses the model's methods. patch_model first; then "
            "checkpoint model.get_image_features, the vision tower, its layers, or the whole model"
        )
    raise InstructionError(
        "visual features were asked for outside of a call that has an instruction. Call model(**inputs) or "
        'model.generate(**inputs), or say which instruction: with adapter.instruction("…"): …, or want none: '
        "with adapter.disable_adapter(): …"
    )


def _forget_interrupted_call(state: AdapterState) -> None:
    """Drop the plan of an interrupted call, after which PyTorch has run no hooks."""
    context = state.context
    belongs_to_a_block = context.pinned is not None or context.recomputed is not None
    if context.plan is None or belongs_to_a_block or torch.compiler.is_compiling():
        return
    if context.caller is not None and not private.is_being_called(context.caller):
        context.plan = context.caller = None


def _by_name(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    if not args:
        return dict(kwargs)
    # Not cached for later calls: torch.compile warns about caches.
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def pop_outer_call(kwargs: dict[str, Any]) -> OuterCall:
    """Take the adapter's arguments out of a call's and return them; ``labels`` stay, since the model takes them too."""
    return OuterCall(
        labels=kwargs.get("labels"),
        assistant_mask=kwargs.pop("assistant_masks", None),
        instruction=kwargs.pop("instruction", None),
        instruction_mask=kwargs.pop("instruction_mask", None),
        records_gradients=torch.is_grad_enabled(),
    )
