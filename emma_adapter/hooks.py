"""How a call to a patched model is intercepted: hooks on the outer model, the inner model and the projectors.

Hooks are functions of this module and find everything through the module they run on: a copy or a pickle of a
patched model is patched too, and independent. No class is changed.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .attachment import PLACE_ATTRIBUTE, alignment_at, is_aligned, projector_parameters
from .calls import OuterCall, RoutedInstruction, route, route_without_prompt
from .errors import InstructionError
from .idle import warn_if_left_out
from .parallel import after_embedding, before_call_without_images, check_wrapped_once_patched
from .planning import has_pixels, pinned_plan, plan_call
from .sharding import execution_device
from .state import AdapterState, state_of

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def install_call_hooks(model: nn.Module, inner: nn.Module) -> None:
    model.register_forward_pre_hook(before_outer, with_kwargs=True)
    inner.register_forward_pre_hook(before_inner, with_kwargs=True)
    inner.register_forward_hook(after_inner, with_kwargs=True, always_call=True)
    model.register_forward_hook(after_outer, with_kwargs=True, always_call=True)


def install_projector_hooks(projector: nn.Module) -> None:
    projector.register_forward_pre_hook(before_projector, with_kwargs=True)
    projector.register_forward_hook(after_projector, with_kwargs=True)


def has_projector_hooks(projector: nn.Module) -> bool:
    return any(hook is before_projector for hook in projector._forward_pre_hooks.values())


def remove_hooks(module: nn.Module) -> None:
    """Remove this library's hooks from ``module``, also from a copy of the module they were installed on."""
    ours = (before_outer, after_outer, before_inner, after_inner, before_projector, after_projector, after_embedding)
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if any(hook is our for our in ours)]:
            del hooks[key]
            for flags in (
                module._forward_pre_hooks_with_kwargs,
                module._forward_hooks_with_kwargs,
                module._forward_hooks_always_called,
            ):
                flags.pop(key, None)


def before_outer(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """Take out of the call what is for the adapter, and note the labels, which the inner model doesn't get."""
    kwargs = _by_name(model, args, kwargs)
    context = state_of(model).context
    context.outer = pop_outer_call(kwargs)
    return (), kwargs


def after_outer(model: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    state_of(model).context.outer = None


def before_inner(inner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """Know the instruction of every row before the vision tower runs."""
    kwargs = _by_name(inner, args, kwargs)
    # Present if the outer model's hooks were passed by, as by wrappers that call forward themselves.
    own = pop_outer_call(kwargs)
    state = state_of(inner)
    context = state.context
    # Taken, not read: after an interrupted call, whose later hooks never ran, it must not be there for the next.
    outer, context.outer = own if context.outer is None else context.outer, None
    if context.disabled:
        return (), kwargs
    if not has_pixels(state.family, kwargs):
        if context.pinned is None:
            before_call_without_images(state, inner, kwargs)
        return (), kwargs
    if inner.training and torch.is_grad_enabled():
        warn_if_left_out(state.model)
    explicit = outer.instruction is not None or own.instruction is not None
    if context.pinned is not None and not explicit and context.pinned.is_prompt_of(kwargs):
        context.plan = pinned_plan(state, inner, context.pinned, kwargs)
        return (), kwargs
    if own.instruction is not None:
        outer = OuterCall(outer.labels, outer.assistant_mask, own.instruction, own.instruction_mask)
    context.plan = plan_call(state, inner, outer, kwargs)
    return (), kwargs


def after_inner(inner: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    context = state_of(inner).context
    context.ties_embeddings = False
    if context.pinned is None:
        context.plan = None


def before_projector(projector: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
    """Replace the projector's input, the visual tokens, by aligned ones."""
    state = state_of(projector)
    visual_tokens, put_back = _first_argument(args, kwargs)
    routed = _routed(state, visual_tokens)
    if routed is None or not is_aligned(state, projector, routed.adapter):
        return None
    device = execution_device(projector)
    if device is not None:
        # As accelerate does with the projector's input, but only after this hook.
        visual_tokens = visual_tokens.to(device)
    alignment = alignment_at(projector, routed.adapter)
    if not torch.compiler.is_compiling() and torch.distributed.is_available() and torch.distributed.is_initialized():
        check_wrapped_once_patched(alignment)
    return put_back(routed.align(alignment, visual_tokens))


def after_projector(projector: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    """While the adapter is disabled, a projector that was trained with it gives way to the original."""
    state = state_of(projector)
    original = state.current.original_projectors.get(getattr(projector, PLACE_ATTRIBUTE))
    if original is None or not _is_disabled(state, _first_argument(args, kwargs)[0]):
        return None
    trained = next(iter(projector_parameters(projector).values()), None)
    # Where the trained one ran, which may not be where its weights or its input lie.
    device = output.device
    original.to(device, None if trained is None else trained.dtype)
    args = tuple(value.to(device) if isinstance(value, Tensor) else value for value in args)
    kwargs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in kwargs.items()}
    return original(*args, **kwargs)


def _is_disabled(state: AdapterState, visual_tokens: Tensor) -> bool:
    """Whether the adapter is, or in the call that is recomputed was, disabled."""
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
        seen, routed = state.memory.recall(visual_tokens)
        # Aligned visual tokens, which the projector got if it was not, are not what is remembered.
        return seen and routed is None
    return bool(state.context.disabled)


def _routed(state: AdapterState, visual_tokens: Tensor) -> RoutedInstruction | None:
    """The instruction for this projector input; None if the adapter is, or in the recomputed call was, disabled."""
    context = state.context
    compiling = torch.compiler.is_compiling()
    if not compiling and torch._C._current_graph_task_id() != -1:
        seen, routed = state.memory.recall(visual_tokens)
        if seen:
            return routed
    if context.disabled:
        routed = None
    elif context.plan is not None:
        routed = route(state.family, context.plan, context.feature_call, visual_tokens)
    elif (named := state.named_instruction) is not None:
        inner = state.family.inner(state.model)
        routed = route_without_prompt(state.family, inner, state.active, named, context.feature_call, visual_tokens)
    else:
        raise InstructionError(
            "visual features were asked for outside of a call that has an instruction. Call model(**inputs) or "
            'model.generate(**inputs), or say which instruction: with adapter.instruction("…"): …, or want none: '
            "with adapter.disabled(): …"
        )
    if not compiling:
        state.memory.remember(visual_tokens, routed)
    return routed


def _first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Callable[[Tensor], Arguments]]:
    if args:
        return args[0], lambda value: ((value, *args[1:]), kwargs)
    name = next(iter(kwargs))
    return kwargs[name], lambda value: ((), {**kwargs, name: value})


def _by_name(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    if not args:
        return dict(kwargs)
    return {**dict(zip(_parameter_names(type(module).forward), args, strict=False)), **kwargs}


@functools.cache
def _parameter_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]


def pop_outer_call(kwargs: dict[str, Any]) -> OuterCall:
    """What a call says to the adapter, taken out of its arguments; ``labels`` stay, they are the model's too."""
    return OuterCall(
        labels=kwargs.get("labels"),
        assistant_mask=kwargs.pop("assistant_masks", None),
        instruction=kwargs.pop("instruction", None),
        instruction_mask=kwargs.pop("instruction_mask", None),
    )
