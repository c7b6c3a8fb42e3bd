"""Channel-wise fusion: latents of pictures beside the base's visual tokens of the same places, u + dW·u + W_g·g.

Two hooks on the base do it, one before the inner model, which notes the pixels of a call, and one behind the projector.
They do nothing but while a prompt to draw from is read, or always with ``fuse_understanding``.
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

from .. import private
from ..errors import UnsupportedModelError
from ..families import MediaLayout, ProjectorCall
from .pixels import entry_pictures, resized
from .state import STATE_ATTRIBUTE, UnifiedState

#: Whether latents are added, in this thread or asynchronous task; None: as the config says.
_FUSING: ContextVar[bool | None] = ContextVar("emma_unified_fusing", default=None)
#: The arguments of the running call of an inner model, until its pictures were fused.
_CALL: ContextVar[tuple[nn.Module, Mapping[str, Any]] | None] = ContextVar("emma_unified_call", default=None)


@contextmanager
def fusing(on: bool) -> Iterator[None]:
    """In the block, latents of pictures are added to their visual tokens, or not."""
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


def _state(module: nn.Module) -> UnifiedState | None:
    state = module.__dict__.get(STATE_ATTRIBUTE)
    if not isinstance(state, UnifiedState):
        return None
    asked = _FUSING.get()
    return state if (state.config.fuse_understanding if asked is None else asked) else None


def _before_inner(inner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if (state := _state(inner)) is None:
        return
    names = list(inspect.signature(type(inner).forward).parameters)[1:]
    arguments = {**dict(zip(names, args, strict=False)), **kwargs}
    pixels = state.family.pixel_arguments["image"]
    _CALL.set(None if arguments.get(pixels) is None else (inner, {**arguments, "pixel_values": arguments[pixels]}))


def _after_inner(inner: nn.Module, args: Any, output: Any) -> None:
    if _CALL.get() is not None:
        _CALL.set(None)


def _after_projector(projector: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    call = _CALL.get()
    if call is None or (state := _state(projector)) is None or not isinstance(output, Tensor):
        return None
    # Once: pixels of videos come after those of images.
    _CALL.set(None)
    inner, arguments = call
    visual = args[0] if args else next(iter(kwargs.values()))
    latents = _latents(state, inner, arguments, visual, output)
    fused = state.module.fuse(output.flatten(0, -2), latents.to(output.device))
    return fused.view_as(output)


def _latents(
    state: UnifiedState, inner: nn.Module, arguments: Mapping[str, Any], visual: Tensor, output: Tensor
) -> Tensor:
    """``[T, C]``, a latent for each of the projector's tokens, in their order."""
    pixels = arguments["pixel_values"]
    shape = tuple(pixels.shape) if isinstance(pixels, Tensor) else tuple(tuple(part.shape) for part in pixels)
    sizes = {name: arguments.get(name) for name in state.family.size_arguments}
    ids = arguments.get("input_ids")
    placeholders = None if ids is None else (ids == state.family.placeholder_id(inner, "image")).sum(1)
    layout = state.family.layout(ProjectorCall(inner, "image", visual, sizes, shape, placeholders))
    grids = token_grids(layout, output)
    compression = state.coder.compression
    pictures = resized(
        entry_pictures(state.processor, arguments, layout),
        [(height * compression, width * compression) for height, width in grids],
    )
    coded = [c.flatten(1).mT for c in encode_grouped(state, [picture.to(output.device) for picture in pictures])]
    if layout.orders is not None and layout.grids is not None:
        side = merged_side(layout, output)
        places = [_places(layout.orders[grid], grid, side) for grid in layout.grids]
        coded = [latents[order.to(latents.device)] for latents, order in zip(coded, places, strict=True)]
    return torch.cat(coded)


def _places(order: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """``[T]``, the place of each token behind a projector that merges blocks of ``side²`` that follow each other.

    Args:
        order: ``[h * w]``, the place of each visual token before it.
        grid: (h, w).
        side: of a block.
    """
    first = order.view(-1, side * side)[:, 0]
    return first // grid[1] // side * (grid[1] // side) + first % grid[1] // side


def encode_grouped(state: UnifiedState, pictures: list[Tensor]) -> list[Tensor]:
    """Return the latents ``[C, h, w]`` of pictures ``[3, H, W]``, those of one size encoded together."""
    found: dict[int, Tensor] = {}
    for size in dict.fromkeys(picture.shape for picture in pictures):
        places = [number for number, picture in enumerate(pictures) if picture.shape == size]
        coded = state.coder.encode(torch.stack([pictures[number] for number in places]), state.config)
        found |= dict(zip(places, coded, strict=True))
    return [found[number] for number in range(len(pictures))]


def merged_side(layout: MediaLayout, output: Tensor) -> int:
    """Return m of a projector that makes one token of m x m visual tokens."""
    assert layout.grids is not None
    patches = sum(height * width for height, width in layout.grids)
    return isqrt(max(1, patches // max(1, output.shape[:-1].numel())))


def token_grids(layout: MediaLayout, output: Tensor) -> list[tuple[int, int]]:
    """Return (height, width) in tokens of each entry behind the projector, which may have merged visual tokens.

    Args:
        layout: of what the projector was given.
        output: of the projector, ``[..., D]``.

    Raises:
        UnsupportedModelError: if the tokens of an entry don't form a grid.
    """
    entries = sum(layout.entries)
    if layout.grids is not None:
        side = merged_side(layout, output)
        grids = [(height // side, width // side) for height, width in layout.grids]
    else:
        each = output.shape[:-1].numel() // max(entries, 1)
        grids = [(isqrt(each), isqrt(each))] * entries
    if sum(height * width for height, width in grids) != output.shape[:-1].numel():
        raise UnsupportedModelError(
            f"the {output.shape[:-1].numel()} visual tokens of {entries} images or tiles don't form grids, as latents "
            "do (a class token among them, perhaps): set vision_feature_select_strategy='default', or use prompts "
            "without pictures"
        )
    return grids
