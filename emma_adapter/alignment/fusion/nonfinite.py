"""Visual tokens that hold NaN or Inf. They are returned as they are, and nothing is computed from them.

What isn't finite carries no information. Without this, an untrained adapter would not be the identity (``0 * Inf`` is
NaN), and a trained one would spread a NaN over its image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...modules.private import is_transformed


def broken_tokens(visual_tokens: Tensor) -> Tensor | None:
    """Return which tokens have a value that isn't finite, ``[..., D] -> [..., 1]``; None if it is known that none has.

    float32 tokens whose sum overflows count as well: LayerNorm has no mean of them.
    """
    tokens = visual_tokens.detach()
    # Faster than the sum below, but it may overflow in float16; then the one below decides.
    if may_look(tokens) and bool(tokens.sum(-1).isfinite().all()):
        return None
    wide = torch.promote_types(tokens.dtype, torch.float32)
    return ~tokens.sum(-1, keepdim=True, dtype=wide).isfinite()


def untouched_tokens(visual_tokens: Tensor, instruction_mask: Tensor | None) -> Tensor | None:
    """Return which visual tokens stay as they are, ``[B, N, 1]`` or ``[B, 1, 1]``; None if it is known that none does.

    They are those of rows whose instruction has no valid token, and those that aren't finite.
    """
    untouched = broken_tokens(visual_tokens)
    if instruction_mask is None:
        return untouched
    uninstructed = ~instruction_mask.any(dim=1)[:, None, None]
    if untouched is not None:
        return untouched | uninstructed
    # Only a look at the values could tell that none is broken, so that another look is allowed.
    return uninstructed if bool(uninstructed.any()) else None


def finite_values(visual_tokens: Tensor) -> Tensor:
    """Return ``visual_tokens`` with zeros for values that aren't finite; itself if it is known that all are."""
    tokens = visual_tokens.detach()
    if may_look(tokens) and bool(tokens.sum(-1).isfinite().all()):
        return visual_tokens
    return visual_tokens.nan_to_num(0.0, 0.0, 0.0)


def may_look(tensor: Tensor) -> bool:
    """Return whether code may depend on values: a GPU would make it wait, and a tracer or ``vmap`` has none."""
    return (
        tensor.device.type == "cpu"
        and type(tensor) is Tensor
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined]
        and not is_transformed()
    )
