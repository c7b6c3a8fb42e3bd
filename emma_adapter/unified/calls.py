"""``model(**inputs, target_pixel_values=…)``: the flow-matching loss in an ordinary call, as Trainer makes it.

A hook before the outer model takes the targets out of the call. One before the inner model computes their loss, inside
whatever wraps the outer model's ``forward`` (accelerate's autocast, say). One behind the outer model adds it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import DataError
from ..models.placeholders import find_placeholders
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
#: Prefix of ids and masks of the same rows with empty prompts, which dropout puts in place of the rows' own.
WITHOUT_TEXT = "without_text_"


class _Running:
    """The running call with targets in this thread."""

    #: Until the loss is computed: the model, targets, sources, the call's other arguments, and those without text.
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
    without_text = {
        name.removeprefix(WITHOUT_TEXT): call.pop(name) for name in list(call) if name.startswith(WITHOUT_TEXT)
    }
    if targets is None:
        return (), call
    ids = call.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        raise DataError(f"{TARGET} needs the prompts as input_ids [B, P]: pass on all that the collator returns")
    _RUNNING.value.pending = (model, targets, sources, dict(call), without_text)
    return (), call if call.get("labels") is not None else _first_token(call, ids)


def _first_token(call: Mapping[str, Any], ids: Tensor) -> dict[str, Any]:
    """Return the call cut down to its first token, which costs next to nothing: only labels need the whole prompt."""
    first_tokens = {
        name: value[:, :1]
        for name, value in call.items()
        if isinstance(value, Tensor) and value.shape == ids.shape and name != "position_ids"
    }
    settings = {name: value for name, value in call.items() if not isinstance(value, (Tensor, list, tuple))}
    return {**settings, **first_tokens, "attention_mask": torch.ones_like(ids[:, :1])}


def _before_inner(inner: nn.Module, args: Any, kwargs: Any) -> None:
    if _RUNNING.value.pending is None:
        return
    (model, targets, sources, call, without_text), _RUNNING.value.pending = _RUNNING.value.pending, None
    state: UnifiedState = model.__dict__[STATE_ATTRIBUTE]
    compression = state.coder.compression
    latents = encode_grouped(state, target_tensors(targets, compression))
    source_latents = None if sources is None else encode_grouped(state, target_tensors(sources, compression))
    drops_pictures = torch.zeros(0, dtype=torch.bool)
    if without_text and torch.is_grad_enabled() and state.config.prompt_dropout:
        call, drops_pictures = _with_dropout(state, inner, call, without_text)
    with recording(model, state, with_pictures=call.get(state.family.pixel_arguments["image"]) is not None):
        prefix = read_prompts(model, state, call)
    if bool(drops_pictures.any()):
        empty_prefix = read_rows(model, state, [("", ())])
        rows = len(drops_pictures)
        index = torch.where(drops_pictures, rows, torch.arange(rows))
        prefix = Prefix.joined([prefix, empty_prefix]).rows(index.to(prefix.mask.device))
    _RUNNING.value.loss = latent_loss(model, state, prefix, latents, source_latents, None)


def _with_dropout(
    state: UnifiedState, inner: nn.Module, call: Mapping[str, Any], without_text: Mapping[str, Any]
) -> tuple[dict[str, Any], Tensor]:
    """Return the call with some rows' texts dropped, and which rows ``[B]`` also lose their pictures.

    Texts are dropped here rather than by the collator, which runs ahead: so a resumed training draws the same numbers.
    """
    ids: Tensor = call["input_ids"]
    share, u = state.config.prompt_dropout, torch.rand(len(ids))
    drops_text = (u < share).to(ids.device)
    has_pictures = find_placeholders(state.family, inner, ids)["image"].any(1).cpu()
    padding = state.processor.tokenizer.pad_token_id or 0
    changed = dict(call)
    for name in without_text:
        pair = call[name], without_text[name]
        length = max(values.shape[1] for values in pair)
        fill = padding if name == "input_ids" else 0
        full, empty = (F.pad(values, (length - values.shape[1], 0), value=fill) for values in pair)
        changed[name] = torch.where(drops_text[:, None], empty.to(full.device), full)
    return changed, has_pictures & (u < share / 2)


def _after_outer(model: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    loss, _RUNNING.value.loss, _RUNNING.value.pending = _RUNNING.value.loss, None, None
    if loss is None or output is None:
        return None
    base_loss = output[0] if isinstance(output, tuple) and kwargs.get("labels") is not None else None
    if isinstance(output, tuple):
        return (loss, *output) if base_loss is None else (base_loss + loss, *output[1:])
    output["loss"] = loss if output.get("loss") is None else output["loss"] + loss
    # Trainer expects the loss to come first.
    return type(output)(**{"loss": output["loss"], **{name: v for name, v in output.items() if name != "loss"}})
