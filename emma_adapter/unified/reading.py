"""Reading rows of prompts and reference pictures with the base, in as few passes as possible."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from ..modules import sharding
from .layers import Prefix, text_model_of
from .prompts import encode_prompts, on_device, read_prompts
from .state import MODULE_NAME, UnifiedState

#: A prompt and its reference pictures.
Row = tuple[str, tuple[Any, ...]]


def device_of(inner: Any) -> torch.device:
    """Return the device on which the model takes its inputs."""
    return sharding.computing_device(text_model_of(inner).embed_tokens)


def read_rows(model: nn.Module, state: UnifiedState, rows: Sequence[Row]) -> Prefix:
    """Read rows with the base: equal ones once, and rows with and without pictures in a pass each.

    Gradients are recorded if the caller records them and something that is trained takes part.
    """
    keys = [(text, tuple(map(id, pictures))) for text, pictures in rows]
    distinct = list(dict.fromkeys(keys))
    prefixes: list[Prefix] = []
    order: list[int] = []
    for with_pictures in (False, True):
        numbers = [number for number, (_, pictures) in enumerate(distinct) if bool(pictures) is with_pictures]
        if not numbers:
            continue
        pass_rows = [rows[keys.index(distinct[number])] for number in numbers]
        inputs = encode_prompts(
            state.processor, [text for text, _ in pass_rows], [list(pictures) for _, pictures in pass_rows]
        )
        inputs = on_device(inputs, device_of(state.family.inner(model)))
        with recording(model, state, with_pictures=with_pictures):
            prefixes.append(read_prompts(model, state, inputs))
        order += numbers
    place = {distinct[number]: at for at, number in enumerate(order)}
    joined = Prefix.joined(prefixes)
    return joined.rows(torch.tensor([place[key] for key in keys], device=joined.mask.device))


def recording(model: nn.Module, state: UnifiedState, *, with_pictures: bool) -> Any:
    """Return a context for reading prompts that records no gradients, and saves their memory, if nothing is trained."""
    trains_fusion = with_pictures and any(parameter.requires_grad for parameter in state.module.fusion.parameters())
    base = (p for name, p in model.named_parameters() if not name.startswith(f"{MODULE_NAME}."))
    return nullcontext() if trains_fusion or any(parameter.requires_grad for parameter in base) else torch.no_grad()
