"""Bilinear resampling between grids of visual tokens, as PyTorch's ``interpolate`` without aligned corners."""

from __future__ import annotations

import torch
from torch import Tensor

from .packed_images import Grid

_WEIGHTS: dict[tuple[int, int, bool, torch.device, torch.dtype], Tensor] = {}
_MAX_WEIGHTS = 512


def resample(tokens: Tensor, source: Grid, target: Grid, *, antialias: bool = False) -> Tensor:
    """Resample ``[..., H * W, C] -> [..., h * w, C]``, row by row on both grids.

    Two products with small matrices instead of ``F.interpolate``: these are deterministic on a GPU, also backward.

    Args:
        tokens: on the grid ``source``.
        source: ``(H, W)``.
        target: ``(h, w)``.
        antialias: average over all source tokens where the target is coarser, so that none is skipped.
    """
    if source == target:
        return tokens
    rows = _weights(source[0], target[0], antialias, tokens)
    columns = _weights(source[1], target[1], antialias, tokens)
    grid = tokens.unflatten(-2, source)
    # First the axis that leaves fewer tokens.
    if target[0] * source[1] <= source[0] * target[1]:
        grid = torch.einsum("yh,...hwc->...ywc", rows, grid)
        return torch.einsum("xw,...ywc->...yxc", columns, grid).flatten(-3, -2)
    grid = torch.einsum("xw,...hwc->...hxc", columns, grid)
    return torch.einsum("yh,...hxc->...yxc", rows, grid).flatten(-3, -2)


def _weights(source: int, target: int, antialias: bool, like: Tensor) -> Tensor:
    """Return the weights ``[target, source]`` on the device and in the dtype of another tensor.

    They are kept there for the next call, which would have to wait for another copy from the host.
    """
    if torch.compiler.is_compiling():
        # A graph that read the kept ones would be compiled again whenever there are more.
        return _triangles(source, target, antialias).to(like.device, like.dtype)
    key = (source, target, antialias, like.device, like.dtype)
    weights = _WEIGHTS.get(key)
    if weights is None:
        with torch.inference_mode(False):
            weights = _triangles(source, target, antialias).to(like.device, like.dtype)
        # A tracer's tensors hold no numbers.
        if type(weights) is Tensor and len(_WEIGHTS) < _MAX_WEIGHTS:
            _WEIGHTS[key] = weights
    return weights


def _triangles(source: int, target: int, antialias: bool) -> Tensor:
    """Return PyTorch's weights ``[target, source]``.

    They are triangles around the centre of each target token, which fall to zero at the next source token or, where
    they average, at the next target token.
    """
    with torch.inference_mode(False), torch.no_grad():
        step = source / target
        width = max(step, 1.0) if antialias else 1.0
        centers = (torch.arange(target, dtype=torch.float64) + 0.5) * step - 0.5
        if not antialias:
            centers = centers.clamp(0, source - 1)
        distances = torch.arange(source, dtype=torch.float64) - centers[:, None]
        weights = (1 - distances.abs() / width).clamp_min(0)
        return weights / weights.sum(dim=1, keepdim=True)
