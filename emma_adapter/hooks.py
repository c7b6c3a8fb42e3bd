"""How a call to a patched model is intercepted: hooks on the outer model, the inner model and the projector.

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

from .errors import InstructionError
from .state import ALIGNMENT_NAME, AdapterState, CallPlan, OuterCall, RoutedInstruction, state_of

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def install_hooks(model: nn.Module, inner: nn.Module, projector: nn.Module) -> None:
    model.register_forward_pre_hook(before_outer, with_kwargs=True)
    model.register_forward_hook(after_outer, with_kwargs=True, always_call=True)
    inner.register_forward_pre_hook(before_inner, with_kwargs=True)
    inner.register_forward_hook(after_inner, with_kwargs=True, always_call=True)
    projector.register_forward_pre_hook(before_projector, with_kwargs=True)
    projector.register_forward_hook(after_projector, with_kwargs=True)


def remove_hooks(module: nn.Module) -> None:
    """Remove this library's hooks from ``module``, also from a copy of the module they were installed on."""
    ours = (before_outer, after_outer, before_inner, after_inner, before_projector, after_projector)
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
    """Take ``instruction=`` out of the call, and note the labels, which the inner model doesn't get."""
    kwargs = _by_name(model, args, kwargs)
    instruction, mask = pop_instruction(kwargs)
    context = state_of(model).context
    if context.pinned is None:
        context.outer = OuterCall(kwargs.get("labels"), instruction, mask)
    return (), kwargs


def after_outer(model: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    state_of(model).context.outer = None


def before_inner(inner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """Know the instruction of every row before the vision tower runs."""
    kwargs = _by_name(inner, args, kwargs)
    # Present if the outer model's hooks were passed by, as by wrappers that call forward themselves.
    instruction, mask = pop_instruction(kwargs)
    state = state_of(inner)
    context = state.context
    if context.disabled or not state.has_pixels(kwargs):
        return (), kwargs
    ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
    placeholders = state.placeholders(inner, ids, embeds)
    repeats = 1
    if context.pinned is not None:
        tokens = context.pinned
        # transformers < 5.18 repeats prompts and pixels for beams before it encodes the images.
        repeats = next(iter(placeholders.values())).shape[0] // len(tokens)
    else:
        outer = context.outer
        if outer is None or instruction is not None:
            outer = OuterCall(None if outer is None else outer.labels, instruction, mask)
        tokens = state.instruction_tokens(inner, outer, placeholders, ids, embeds, kwargs.get("attention_mask"))
    context.plan = CallPlan(inner, tokens, placeholders, state.sizes(kwargs), repeats)
    return (), kwargs


def after_inner(inner: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    context = state_of(inner).context
    if context.pinned is None:
        context.plan = None


def before_projector(projector: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
    """Replace the projector's input, the visual tokens, by aligned ones."""
    state = state_of(projector)
    visual_tokens, put_back = _first_argument(args, kwargs)
    routed = _routed(state, visual_tokens)
    if routed is None:
        return None
    alignment = projector.get_submodule(ALIGNMENT_NAME)
    return put_back(routed.align(alignment, visual_tokens))  # type: ignore[arg-type]


def after_projector(projector: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    """While the adapter is disabled, a projector that was trained with it gives way to the original."""
    state = state_of(projector)
    if not state.context.disabled or state.original_projector is None:
        return None
    trained = next(projector.parameters())
    return state.original_projector.to(trained.device, trained.dtype)(*args, **kwargs)


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
        routed = state.route(context.plan, visual_tokens)
    elif context.named is not None:
        routed = state.route_without_prompt(context.named, visual_tokens)
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


def pop_instruction(kwargs: dict[str, Any]) -> tuple[Any, Tensor | None]:
    return kwargs.pop("instruction", None), kwargs.pop("instruction_mask", None)
