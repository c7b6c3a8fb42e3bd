"""How a call to a patched model is intercepted: hooks on the outer model, the inner model and the projectors.

Hooks are functions of this module and find everything through the module they run on: a copy or a pickle of a
patched model is patched too, and independent. No class is changed.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InstructionError
from ..models.feature_calls import FeatureCall, projector_call
from ..modules import private
from ..modules.gradient_checkpointing import is_recomputing, may_be_recomputed, with_own_memory
from ..modules.method_guard import STATE_ATTRIBUTE, first_argument
from ..modules.sharding import execution_device
from .call_context import CallContext
from .call_plan import Bypass, CallPlan, GivenPrompt, OuterCall
from .original_projector import OriginalProjector
from .planning import has_pixels, pinned_plan, plan_call
from .routing import ObservedAlignment, RoutedInstruction, check_tokens, route, route_without_prompt
from .setup_checks import check_wrapped_once_patched, warn_if_left_out
from .sites import PLACE_ATTRIBUTE, alignment_at, is_aligned, projector_parameters
from .state import AdapterState, state_of
from .without_images import after_embedding, before_call_without_images

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def install_call_hooks(model: nn.Module, inner: nn.Module) -> None:
    model.register_forward_pre_hook(before_outer, with_kwargs=True)
    inner.register_forward_pre_hook(before_inner, with_kwargs=True)
    inner.register_forward_hook(after_inner, with_kwargs=True, always_call=True)
    model.register_forward_hook(after_outer, with_kwargs=True, always_call=True)


def install_prompt_hooks(wrapper: nn.Module) -> None:
    """On a ``PeftModel`` that puts virtual tokens before the prompt."""
    wrapper.register_forward_pre_hook(before_virtual_tokens, with_kwargs=True)
    wrapper.register_forward_hook(after_virtual_tokens, with_kwargs=True, always_call=True)


def install_projector_hooks(projector: nn.Module) -> None:
    projector.register_forward_pre_hook(before_projector, with_kwargs=True)
    projector.register_forward_hook(after_projector, with_kwargs=True)


def has_projector_hooks(projector: nn.Module) -> bool:
    return any(hook is before_projector for hook in private.pre_hooks(projector))


def remove_hooks(module: nn.Module) -> None:
    """Remove this library's hooks from ``module``, also from a copy of the module they were installed on."""
    ours = (
        *(before_virtual_tokens, after_virtual_tokens, before_outer, after_outer, before_inner, after_inner),
        *(before_projector, after_projector, after_embedding),
    )
    private.remove_hooks(module, ours)


def before_virtual_tokens(wrapper: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Note the prompt, whose tokens the model may not get, but embeddings that begin with the virtual tokens'."""
    arguments = _by_name(wrapper, args, kwargs)
    ids = arguments.get("input_ids")
    if isinstance(ids, Tensor) and ids.ndim == 2 and hasattr(wrapper, STATE_ATTRIBUTE):
        given = GivenPrompt(ids, arguments.get("attention_mask"), arguments.get("labels"))
        state_of(wrapper).context.given = given


def after_virtual_tokens(wrapper: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    if hasattr(wrapper, STATE_ATTRIBUTE):
        state_of(wrapper).context.given = None


def before_outer(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """Take out of the call what is for the adapter, and note the labels, which the inner model doesn't get."""
    kwargs = _by_name(model, args, kwargs)
    state = state_of(model)
    for given, known in state.bridged_arguments.items():
        if given in kwargs:
            kwargs.setdefault(known, kwargs.pop(given))
    _enter_call(state, model, kwargs)
    state.context.outer = pop_outer_call(kwargs)
    if state.context.may_be_recomputed and (prompt := _prompt_name(kwargs)):
        kwargs[prompt] = with_own_memory(kwargs[prompt])
    return (), kwargs


def after_outer(model: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    context = state_of(model).context
    context.outer = None
    _leave_call(context, model)


def before_inner(inner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """Know the instruction of every row before the vision tower runs."""
    kwargs = _by_name(inner, args, kwargs)
    # Present if the outer model's hooks were passed by, as by wrappers that call forward themselves.
    own = pop_outer_call(kwargs)
    state = state_of(inner)
    context = state.context
    # Taken, not read: after an interrupted call, whose later hooks never ran, it must not be there for the next.
    outer, context.outer = context.outer, None
    given, context.given = context.given, None
    if outer is None:
        if is_recomputing() and (prompt := _prompt_name(kwargs)):
            plan = state.memories.plans.recall(kwargs[prompt])
            if plan is not None:
                state.resume(inner, plan)
                return (), kwargs
        _enter_call(state, inner, kwargs)
        outer = own
    elif own.instruction is not None:
        outer = dataclasses.replace(outer, instruction=own.instruction, instruction_mask=own.instruction_mask)
    told = kwargs
    if given is not None and given.is_end_of(kwargs):
        outer, told = dataclasses.replace(outer, labels=given.labels), given.in_place_of(kwargs)
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
        context.plan = _plan(state, inner, outer, told)
    if context.may_be_recomputed:
        _remember_call(state, context.plan, kwargs)
    return (), kwargs


def after_inner(inner: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    context = state_of(inner).context
    context.ties_embeddings = False
    _leave_call(context, inner)
    context.plan = None if context.pinned is None else context.pinned.plan


def _plan(state: AdapterState, inner: nn.Module, outer: OuterCall, kwargs: dict[str, Any]) -> CallPlan:
    pinned = state.context.pinned
    if pinned is not None and outer.instruction is None and pinned.is_prompt_of(kwargs):
        return pinned_plan(state, inner, pinned, kwargs)
    return plan_call(state, inner, outer, kwargs)


def _remember_call(state: AdapterState, plan: CallPlan | Bypass, kwargs: dict[str, Any]) -> None:
    """For when only a part of this call is computed again."""
    if prompt := _prompt_name(kwargs):
        remembered = plan.without_model() if isinstance(plan, CallPlan) else plan
        state.memories.plans.remember(kwargs[prompt], remembered)
    for modality in state.family.modalities:
        name = state.family.pixel_arguments[modality]
        if kwargs.get(name) is not None:
            kwargs[name] = with_own_memory(kwargs[name])


def _enter_call(state: AdapterState, module: nn.Module, kwargs: dict[str, Any]) -> None:
    """Of a call that may be computed again, or is: the scope that it is, or was, made in."""
    context, prompt = state.context, _prompt_name(kwargs)
    context.recomputed = None
    context.may_be_recomputed = may_be_recomputed(module)
    if not state.has_blocks or prompt is None or torch.compiler.is_compiling():
        return
    if not is_recomputing():
        state.memories.scopes.remember(kwargs[prompt], state.scope)
    elif (scope := state.memories.scopes.recall(kwargs[prompt])) is not None:
        context.recomputed = (module, scope)


def _leave_call(context: CallContext, module: nn.Module) -> None:
    if context.recomputed is not None and context.recomputed[0] is module:
        context.recomputed = None


def _prompt_name(kwargs: dict[str, Any]) -> str | None:
    return next((name for name in ("input_ids", "inputs_embeds") if isinstance(kwargs.get(name), Tensor)), None)


def before_projector(projector: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
    """Replace the projector's input, the visual tokens, by aligned ones; or note that its output is to be aligned."""
    state = state_of(projector)
    context = state.context
    visual_tokens, put_back = first_argument(args, kwargs)
    route = _route(state, projector, visual_tokens)
    context.stand_in = _stand_in(state, projector, route)
    context.unchecked_tokens = None if isinstance(route, Bypass) else route.unchecked_tokens
    context.aligns_output = None
    if isinstance(route, Bypass) or not is_aligned(state, projector, route.adapter):
        return None
    if state.adapters[route.adapter].config.aligns_projected:
        context.aligns_output = route
        return None
    return put_back(_align(state, projector, route, visual_tokens))


def _align(state: AdapterState, projector: nn.Module, route: RoutedInstruction, visual_tokens: Tensor) -> Tensor:
    device = execution_device(projector)
    if device is not None:
        # As accelerate does with the projector's input, but only after this hook.
        visual_tokens = visual_tokens.to(device)
    alignment = alignment_at(projector, route.adapter)
    if not torch.compiler.is_compiling() and torch.distributed.is_available() and torch.distributed.is_initialized():
        check_wrapped_once_patched(alignment)
    aligned = route.align(alignment, visual_tokens)
    if state.context.observer is not None:
        _tell_observer(state, projector, route, visual_tokens, aligned)
    return aligned


def _tell_observer(
    state: AdapterState, projector: nn.Module, route: RoutedInstruction, visual_tokens: Tensor, aligned: Tensor
) -> None:
    context, family = state.context, state.family
    assert context.observer is not None
    plan = context.plan if isinstance(context.plan, CallPlan) else None
    running = context.feature_call or (
        plan.feature_call if plan else FeatureCall.of(family, family.modalities[0], None, {})
    )
    inner = family.inner(state.model)
    call = projector_call(inner, running, visual_tokens, plan.placeholders[running.modality] if plan else None)
    context.observer(ObservedAlignment(getattr(projector, PLACE_ATTRIBUTE), route, call, visual_tokens, aligned))


def after_projector(projector: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    """Where the projector was trained with an adapter, and the call doesn't go through that one, another gives the
    output; and where an adapter aligns the output, do so.

    Raises:
        RoutingError: if the images take other numbers of tokens than their rows were found with, or the output that is
            to be aligned can't be divided into them.
    """
    state = state_of(projector)
    context = state.context
    unchecked, context.unchecked_tokens = context.unchecked_tokens, None
    if unchecked is not None and isinstance(output, Tensor):
        check_tokens(*unchecked, output)
    kept, context.stand_in = context.stand_in, None
    route, context.aligns_output = context.aligns_output, None
    if kept is not None:
        output = _output_of(kept, projector, args, kwargs, output.device)
    if route is None:
        return None if kept is None else output
    return _align(state, projector, route.of_projected(output), output).to(output.device)


def _output_of(kept: OriginalProjector, projector: nn.Module, args: Any, kwargs: Any, device: torch.device) -> Any:
    """What another projector makes of the same arguments."""
    trained = next(iter(projector_parameters(projector).values()), None)
    # Where the trained one ran, which may not be where its weights or its input lie.
    original = kept.at(device, None if trained is None else trained.dtype)
    args = tuple(value.to(device) if isinstance(value, Tensor) else value for value in args)
    kwargs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in kwargs.items()}
    return original(*args, **kwargs)


def _stand_in(state: AdapterState, projector: nn.Module, route: RoutedInstruction | Bypass) -> OriginalProjector | None:
    """What is to compute instead of a projector whose weights, trained with the active adapter, aren't the call's."""
    place = getattr(projector, PLACE_ATTRIBUTE)
    chosen, own = state.adapters[state.chosen], state.adapters[route.adapter]
    if not isinstance(route, Bypass):
        if own is chosen:
            return None
        if own.parked_projectors:
            if place not in own.stand_ins:
                made = copy.deepcopy(own.original_projectors[place])
                made.assign({name: own.parked_projectors[place + name] for name in made.values()})
                own.stand_ins[place] = made
            return own.stand_ins[place]
    return own.original_projectors.get(place) or chosen.original_projectors.get(place)


def _route(state: AdapterState, projector: nn.Module, visual_tokens: Tensor) -> RoutedInstruction | Bypass:
    """The instructions for this projector input."""
    if is_recomputing() and (remembered := state.memories.routes.recall(visual_tokens)) is not None:
        return remembered
    found = _new_route(state, visual_tokens)
    # Reentrant checkpointing of a frozen projector records no gradients, and shows in its input alone.
    if state.context.may_be_recomputed or may_be_recomputed(projector) or visual_tokens.requires_grad:
        state.memories.routes.remember(visual_tokens, found)
    return found


def _new_route(state: AdapterState, visual_tokens: Tensor) -> RoutedInstruction | Bypass:
    context = state.context
    plan = context.plan
    if isinstance(plan, Bypass):
        return plan
    if state.scope.disabled:
        return Bypass(state.active)
    if plan is not None:
        return route(state.family, plan, context.feature_call, visual_tokens)
    if (named := state.named_instruction) is not None:
        inner = state.family.inner(state.model)
        return route_without_prompt(state.family, inner, state.active, named, context.feature_call, visual_tokens)
    if is_recomputing():
        raise InstructionError(
            "a checkpointed part of the vision side is computed again for backward, and it can't be told for which "
            "call: it was made before patch_model, or goes round the model's methods. patch_model first; then "
            "checkpoint model.get_image_features, the vision tower, its layers, or the whole model"
        )
    raise InstructionError(
        "visual features were asked for outside of a call that has an instruction. Call model(**inputs) or "
        'model.generate(**inputs), or say which instruction: with adapter.instruction("…"): …, or want none: '
        "with adapter.disabled(): …"
    )


def _by_name(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    if not args:
        return dict(kwargs)
    # Not kept for later calls: torch.compile warns of whatever is.
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def pop_outer_call(kwargs: dict[str, Any]) -> OuterCall:
    """What a call says to the adapter, taken out of its arguments; ``labels`` stay, they are the model's too."""
    return OuterCall(
        labels=kwargs.get("labels"),
        assistant_mask=kwargs.pop("assistant_masks", None),
        instruction=kwargs.pop("instruction", None),
        instruction_mask=kwargs.pop("instruction_mask", None),
        records_gradients=torch.is_grad_enabled(),
    )
