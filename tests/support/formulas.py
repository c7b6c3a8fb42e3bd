"""The fusions' formulas in any dtype, written without a line of the package, and what is measured against them."""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from emma_adapter import EmmaAlignment, EmmaConfig
from tests.kernels.precision import BITS, TOLERANCES


def same_bits(left: Tensor, right: Tensor) -> bool:
    assert left.shape == right.shape and left.dtype == right.dtype
    return torch.equal(left.contiguous().view(BITS[left.dtype]), right.contiguous().view(BITS[right.dtype]))


def same(left: Tensor, right: Tensor) -> bool:
    """Bit for bit, but for the spare bits of a NaN, which conversions between dtypes don't keep."""
    return torch.equal(left.isnan(), right.isnan()) and same_bits(*(x.masked_fill(x.isnan(), 0) for x in (left, right)))


def results(alignment: EmmaAlignment, v: Tensor, t: Tensor, *args, **kwargs) -> dict[str, Tensor]:
    """The output, and the gradients of its weighted sum; the weights are exact in every dtype."""
    own = copy.deepcopy(alignment)
    v, t = v.clone().requires_grad_(), t.clone().requires_grad_()
    y = own(v, t, *args, **kwargs)
    y.backward(weighting(y))
    return {"y": y.detach(), "v": v.grad, "t": t.grad, **{name: p.grad for name, p in own.named_parameters()}}


def weighting(y: Tensor) -> Tensor:
    return (torch.randint(-8, 9, y.shape, generator=torch.Generator().manual_seed(5)) / 8).to(y.dtype)


def normed(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def resized(table: Tensor, old: tuple[int, int], new: tuple[int, int], *, antialias: bool) -> Tensor:
    """``[..., H W, C] -> [..., h w, C]``."""
    picture = table.unflatten(-2, old).movedim(-1, -3)
    picture = picture if picture.ndim == 4 else picture[None]
    # PyTorch averages in float32 at least.
    picture = picture.to(torch.promote_types(picture.dtype, torch.float32))
    found = F.interpolate(picture, size=new, mode="bilinear", align_corners=False, antialias=antialias)
    found = found.flatten(-2).mT.reshape(*table.shape[:-2], new[0] * new[1], table.shape[-1])
    return found.to(table.dtype)


def formula(
    config: EmmaConfig,
    p: dict[str, Tensor],
    v: Tensor,
    t: Tensor,
    mask: Tensor | None = None,
    grid: tuple[int, int] | None = None,
) -> Tensor:
    """``[B, N, D], [B, T, Dt], bool [B, T], (h, w) -> [B, N, D]``."""
    p = {name.removeprefix("fusion.").removeprefix("cross_attention."): value for name, value in p.items()}
    valid = torch.ones(t.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    native = config.visual_grid
    other = grid is not None and grid != native
    if config.fusion == "linear":
        hidden = t @ p["instruction_projection.weight"].T + p["instruction_projection.bias"]
        hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2 * valid[..., None]
        image = p["image_weight"] if "image_weight" in p else p["image_up"] @ p["image_down"]
        x = resized(v, grid, native, antialias=True) if other else v
        update = image @ x + p["text_weight"][:, : t.shape[1]] @ hidden + p["bias"][:, None]
        return v + (resized(update, native, grid, antialias=False) if other else update)
    position = p["position"]
    if other:
        position = resized(position, native, grid, antialias=False)
    query = normed(v, p["visual_norm.weight"], p["visual_norm.bias"]) @ p["query.weight"].T + p["query.bias"] + position
    instruction = normed(t, p["instruction_norm.weight"], p["instruction_norm.bias"])
    key, value = instruction @ p["key.weight"].T, instruction @ p["value.weight"].T + p["value.bias"]
    q, k, u = (x.unflatten(-1, (config.num_heads, -1)).transpose(1, 2) for x in (query, key, value))
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~valid[:, None, None], -math.inf)
    scores = scores.masked_fill(~valid.any(1)[:, None, None, None], 0)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    attended = (weights / weights.sum(-1, keepdim=True)) @ u
    update = attended.transpose(1, 2).flatten(-2) @ p["output.weight"].T + p["output.bias"]
    aligned = v + update if config.fusion == "attention" else v * 2 / (1 + (-update).exp())
    return torch.where(valid.any(1)[:, None, None], aligned, v)


def expected(
    alignment: EmmaAlignment, v: Tensor, t: Tensor, mask: Tensor | None = None, *, grid=None, dtype=torch.float64
) -> dict[str, Tensor]:
    """What :func:`results` should find; in another dtype, what plain PyTorch makes of the formula."""
    p = {name: value.detach().to(dtype).requires_grad_() for name, value in alignment.named_parameters()}
    v, t = v.detach().to(dtype).requires_grad_(), t.detach().to(dtype).requires_grad_()
    y = formula(alignment.config, p, v, t, mask, grid)
    y.backward(weighting(y))
    return {"y": y.detach(), "v": v.grad, "t": t.grad, **{name: value.grad for name, value in p.items()}}


def assert_correct(alignment: EmmaAlignment, v: Tensor, t: Tensor, *args, only_finite: tuple[str, ...] = (), **kwargs):
    """Within the tolerance, relative to the largest value of a tensor. A gradient that is the small difference of large
    ones may be off by more, but not by many times what PyTorch is in that dtype."""
    found, want = results(alignment, v, t, *args, **kwargs), expected(alignment, v, t, *args, **kwargs)
    plain = expected(alignment, v, t, *args, **kwargs, dtype=v.dtype)
    forward, backward = TOLERANCES[v.dtype]
    for name, value in want.items():
        assert found[name].isfinite().all(), name
        if name.rpartition("cross_attention.")[2] in only_finite:
            continue
        scale = value.abs().max().clamp_min(1e-6)
        off, usual = (((own[name].double() - value).abs().max() / scale).item() for own in (found, plain))
        assert off <= (forward if name == "y" else max(backward, 4 * usual)), (name, off, usual)
