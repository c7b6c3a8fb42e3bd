"""``model(**inputs, target_pixel_values=…)``: the flow-matching loss in an ordinary call, as Trainer makes it.

A hook before the outer model takes the targets out of the call. One before the inner model computes their loss, within
what stands around the outer model's ``forward`` (accelerate's autocast, say). One behind the outer model adds it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import DataError
from ..modules import private
from ..modules.per_thread import PerThread
from .fusion import encode_grouped
from .layers import Prefix
from .losses import latent_loss
from .pictures import target_tensors
from .prompts import read_prompts
from .reading import read_rows, recording
from .state import STATE_ATTRIBUTE, UnifiedState

TARGET, SOURCE = "target_pixel_values", "source_pixel_values"
#: Of the names of ids and masks of the same rows without their texts: what dropout puts in their place.
WITHOUT_TEXT = "without_text_"


class _Running:
    """The call of a model in this thread that has targets."""

    #: Targets, sources, the call's other arguments, and those without text, until their loss is computed.
    pending: tuple[nn.Module, Any, Any, Mapping[str, Any], Mapping[str, Any]] | None = None
    loss: Tensor | None = None


_RUNNING = PerThread(_Running)


def install(model: nn.Module, inner: nn.Module) -> None:
    model.register_forward_pre_hook(_before_outer, with_kwargs=True)
    inner.register_forward_pre_hook(_before_inner, with_kwargs=True)
    model.register_forward_hook(_after_outer, with_kwargs=True, always_call=True)


def remove(module: nn.Module) -> None:
    """Remove this file's hooks from a module, also from a copy of the one that they were installed on."""
    private.remove_hooks(module, (_before_outer, _before_inner, _after_outer))


def _before_outer(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    _RUNNING.value.pending = _RUNNING.value.loss = None
    if not isinstance(model.__dict__.get(STATE_ATTRIBUTE), UnifiedState) or TARGET not in kwargs:
        return None
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    call = {**dict(zip(names, args, strict=False)), **kwargs}
    targets, sources = call.pop(TARGET), call.pop(SOURCE, None)
    without = {name: call.pop(name) for name in list(call) if name.startswith(WITHOUT_TEXT)}
    if targets is None:
        return (), call
    ids = call.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        raise DataError(f"{TARGET} needs the prompts as input_ids [B, P]: pass on all that the collator returns")
    without = {name.removeprefix(WITHOUT_TEXT): value for name, value in without.items()}
    _RUNNING.value.pending = (model, targets, sources, dict(call), without)
    return (), call if call.get("labels") is not None else _first_token(call, ids)


def _first_token(call: Mapping[str, Any], ids: Tensor) -> dict[str, Any]:
    """A call that costs next to nothing: without labels, the base has nothing to compute but what the loss does."""
    cut = {
        name: value[:, :1]
        for name, value in call.items()
        if isinstance(value, Tensor) and value.shape == ids.shape and name != "position_ids"
    }
    rest = {name: value for name, value in call.items() if not isinstance(value, (Tensor, list, tuple))}
    return {**rest, **cut, "attention_mask": torch.ones_like(ids[:, :1])}


def _before_inner(inner: nn.Module, args: Any, kwargs: Any) -> None:
    if _RUNNING.value.pending is None:
        return
    (model, targets, sources, call, without), _RUNNING.value.pending = _RUNNING.value.pending, None
    state: UnifiedState = model.__dict__[STATE_ATTRIBUTE]
    compression = state.coder.compression
    latents = encode_grouped(state, target_tensors(targets, compression))
    before = None if sources is None else encode_grouped(state, target_tensors(sources, compression))
    gone = torch.zeros(0, dtype=torch.bool)
    if without and torch.is_grad_enabled() and state.config.prompt_dropout:
        call, gone = _dropped(state, inner, call, without)
    with recording(model, state, with_pictures=call.get(state.family.pixel_arguments["image"]) is not None):
        prefix = read_prompts(model, state, call)
    if bool(gone.any()):
        nothing = read_rows(model, state, [("", ())])
        index = torch.where(gone, len(gone), torch.arange(len(gone)))
        prefix = Prefix.joined([prefix, nothing]).rows(index.to(prefix.mask.device))
    _RUNNING.value.loss = latent_loss(model, state, prefix, latents, before, None)


def _dropped(
    state: UnifiedState, inner: nn.Module, call: Mapping[str, Any], without: Mapping[str, Any]
) -> tuple[dict[str, Any], Tensor]:
    """The call with some rows' texts dropped, and which rows ``[B]`` are to lose their pictures too.

    Here rather than where batches are made, which is ahead of time: a training that is resumed draws the same numbers.
    """
    ids: Tensor = call["input_ids"]
    share, u = state.config.prompt_dropout, torch.rand(len(ids))
    without_text = (u < share).to(ids.device)
    has_pictures = (ids == state.family.placeholder_id(inner, "image")).any(1).cpu()
    padding = state.processor.tokenizer.pad_token_id or 0
    changed = dict(call)
    for name, other in without.items():
        own = call[name]
        length = max(own.shape[1], other.shape[1])
        value = padding if name == "input_ids" else 0
        own, with_none = (F.pad(each, (length - each.shape[1], 0), value=value) for each in (own, other))
        changed[name] = torch.where(without_text[:, None], with_none.to(own.device), own)
    return changed, has_pictures & (u < share / 2)


def _after_outer(model: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    loss, _RUNNING.value.loss, _RUNNING.value.pending = _RUNNING.value.loss, None, None
    if loss is None or output is None:
        return None
    own = output[0] if isinstance(output, tuple) and kwargs.get("labels") is not None else None
    if isinstance(output, tuple):
        return (loss, *output) if own is None else (own + loss, *output[1:])
    output["loss"] = loss if output.get("loss") is None else output["loss"] + loss
    # The loss goes first, as Trainer takes it.
    return type(output)(**{"loss": output["loss"], **{name: v for name, v in output.items() if name != "loss"}})
