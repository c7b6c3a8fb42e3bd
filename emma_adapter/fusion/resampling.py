"""From one grid of visual tokens to another: bilinear, as PyTorch's ``interpolate`` without aligned corners."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .packing import Grid

_WEIGHTS: dict[tuple[int, int, bool], Tensor] = {}
_MAX_WEIGHTS = 512


def resample(tokens: Tensor, source: Grid, target: Grid, *, antialias: bool = False) -> Tensor:
    """``[..., H * W, C] -> [..., h * w, C]``, row by row on both grids.

    Two products with small matrices instead of ``F.interpolate``: these are deterministic on a GPU, also backward.

    Args:
        tokens: on the grid ``source``.
        source: ``(H, W)``.
        target: ``(h, w)``.
        antialias: average over all source tokens where the target is coarser, so that none is passed over.
    """
    if source == target:
        return tokens
    rows = _weights(source[0], target[0], antialias).to(tokens.device, tokens.dtype)
    columns = _weights(source[1], target[1], antialias).to(tokens.device, tokens.dtype)
    grid = tokens.unflatten(-2, source)
    resampled = torch.einsum("yh,xw,...hwc->...yxc", rows, columns, grid)
    return resampled.flatten(-3, -2)


def _weights(source: int, target: int, antialias: bool) -> Tensor:
    """``[target, source]``, kept for the next call."""
    key = (source, target, antialias)
    if torch.compiler.is_compiling():
        # A graph that had looked it up would be compiled again whenever there is more to look up.
        return _one_hot_rows(*key)
    known = _WEIGHTS.get(key)
    if known is None:
        known = _one_hot_rows(*key)
        # In a tracer's tensors there are no numbers.
        if type(known) is Tensor and len(_WEIGHTS) < _MAX_WEIGHTS:
            _WEIGHTS[key] = known
    return known


def _one_hot_rows(source: int, target: int, antialias: bool) -> Tensor:
    """PyTorch's own weights, found by resampling one-hot rows."""
    with torch.inference_mode(False), torch.no_grad():
        one_hot = torch.eye(source, dtype=torch.float64)[None, None]
        size = (target, source)
        return F.interpolate(one_hot, size=size, mode="bilinear", align_corners=False, antialias=antialias)[0, 0]
