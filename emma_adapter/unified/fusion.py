"""Channel-wise fusion of pictures' latents with the base's visual tokens at the same places, u + dW·u + W_g·g.

Two hooks on the base do it: one before the inner model notes a call's pixels, one behind the projector adds latents.
They act only while a prompt to draw from is read; with ``fuse_understanding``, in every call.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..models.families import MediaLayout, ProjectorCall
from ..models.placeholders import find_placeholders
from ..modules import private
from ..modules.method_guard import first_tensor
from .pixels import entry_pictures, resized
from .state import STATE_ATTRIBUTE, UnifiedState

#: Whether latents are added, in this thread or asynchronous task; None: as the config says.
_FUSING: ContextVar[bool | None] = ContextVar("emma_unified_fusing", default=None)
#: The inner model that is running and the arguments of its call, until its pictures are fused.
_CALL: ContextVar[tuple[nn.Module, Mapping[str, Any]] | None] = ContextVar("emma_unified_call", default=None)


@contextmanager
def fusing(on: bool) -> Iterator[None]:
    """Add latents of pictures to their visual tokens within the block, or don't, whatever the config says."""
    token = _FUSING.set(on)
    try:
        yield
    finally:
        _FUSING.reset(token)


def install(inner: nn.Module, projector: nn.Module) -> None:
    inner.register_forward_pre_hook(_before_inner, with_kwargs=True)
    inner.register_forward_hook(_after_inner, always_call=True)
    projector.register_forward_hook(_after_projector, with_kwargs=True)


def remove(module: nn.Module) -> None:
    """Remove this file's hooks from a module, also from a copy of the one that they were installed on."""
    private.remove_hooks(module, (_before_inner, _after_inner, _after_projector))


def _state_if_fusing(module: nn.Module) -> UnifiedState | None:
    state = module.__dict__.get(STATE_ATTRIBUTE)
    if not isinstance(state, UnifiedState):
        return None
    override = _FUSING.get()
    return state if (state.config.fuse_understanding if override is None else override) else None


def _before_inner(inner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if (state := _state_if_fusing(inner)) is None:
        return
    names = list(inspect.signature(type(inner).forward).parameters)[1:]
    arguments = {**dict(zip(names, args, strict=False)), **kwargs}
    pixels = arguments.get(state.family.pixel_arguments["image"])
    _CALL.set(None if pixels is None else (inner, {**arguments, "pixel_values": pixels}))


def _after_inner(inner: nn.Module, args: Any, output: Any) -> None:
    if _CALL.get() is not None:
        _CALL.set(None)


def _after_projector(projector: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    call = _CALL.get()
    if call is None or (state := _state_if_fusing(projector)) is None or not isinstance(output, Tensor):
        return None
    visual_tokens = first_tensor(args, kwargs)
    if visual_tokens is None:
        return None
    # The projector may run again in this call, for videos, which come after images and aren't fused.
    _CALL.set(None)
    inner, arguments = call
    latents = _latents(state, inner, arguments, visual_tokens[0], output)
    fused = state.module.fuse(output.flatten(0, -2), latents.to(output.device))
    return fused.view_as(output)


def _latents(
    state: UnifiedState, inner: nn.Module, arguments: Mapping[str, Any], visual: Tensor, output: Tensor
) -> Tensor:
    """Return the latents ``[T, C]`` that belong to the projector's tokens, in their order."""
    pixels = arguments["pixel_values"]
    shape = tuple(pixels.shape) if isinstance(pixels, Tensor) else tuple(tuple(part.shape) for part in pixels)
    sizes = {name: arguments.get(name) for name in state.family.size_arguments}
    ids = arguments.get("input_ids")
    placeholders = None if ids is None else find_placeholders(state.family, inner, ids)["image"].sum(1)
    layout = state.family.layout(ProjectorCall(inner, "image", visual, sizes, shape, placeholders))
    grids = token_grids(layout, output)
    compression = state.coder.compression
    pictures = resized(
        entry_pictures(state.processor, arguments, layout),
        [(height * compression, width * compression) for height, width in grids],
    )
    encoded = encode_grouped(state, [picture.to(output.device) for picture in pictures])
    latents = [picture_latents.flatten(1).mT for picture_latents in encoded]
    if layout.orders is not None and layout.grids is not None:
        side = merged_side(layout, output)
        orders = [_merged_order(layout.orders[grid], grid, side) for grid in layout.grids]
        latents = [values[order.to(values.device)] for values, order in zip(latents, orders, strict=True)]
    return torch.cat(latents)


def _merged_order(order: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """Return the place ``[T]`` of each token behind a projector that merges ``side²`` consecutive visual tokens.

    Args:
        order: ``[h * w]``, the place of each visual token before the projector.
        grid: (h, w).
        side: of the block that is merged.
    """
    first = order.view(-1, side * side)[:, 0]
    return first // grid[1] // side * (grid[1] // side) + first % grid[1] // side


def encode_grouped(state: UnifiedState, pictures: list[Tensor]) -> list[Tensor]:
    """Return the latents ``[C, h, w]`` of pictures ``[3, H, W]``, encoding those of one size together."""
    latents: dict[int, Tensor] = {}
    for size in dict.fromkeys(picture.shape for picture in pictures):
        numbers = [number for number, picture in enumerate(pictures) if picture.shape == size]
        encoded = state.coder.encode(torch.stack([pictures[number] for number in numbers]), state.config)
        latents |= dict(zip(numbers, encoded, strict=True))
    return [latents[number] for number in range(len(pictures))]


def merged_side(layout: MediaLayout, output: Tensor) -> int:
    """Return m of a projector that merges m x m visual tokens into one."""
    assert layout.grids is not None
    patches = sum(height * width for height, width in layout.grids)
    return isqrt(max(1, patches // max(1, output.shape[:-1].numel())))


def token_grids(layout: MediaLayout, output: Tensor) -> list[tuple[int, int]]:
    """Return each entry's (height, width) in tokens behind the projector, which may have merged visual tokens.

    Args:
        layout: of the projector's input.
        output: of the projector, ``[..., D]``.

    Raises:
        UnsupportedModelError: if the tokens of an entry don't form a grid.
    """
    entries, tokens = sum(layout.entries), output.shape[:-1].numel()
    if layout.grids is not None:
        side = merged_side(layout, output)
        grids = [(height // side, width // side) for height, width in layout.grids]
    else:
        side = isqrt(tokens // max(entries, 1))
        grids = [(side, side)] * entries
    if sum(height * width for height, width in grids) != tokens:
        raise UnsupportedModelError(
            f"the {tokens} visual tokens of {entries} images or tiles don't form grids, as latents do (a class token "
            "among them, perhaps): set vision_feature_select_strategy='default', or use prompts without pictures"
        )
    return grids
