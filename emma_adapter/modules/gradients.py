"""Gradients of parameters that a call doesn't use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def with_zero_gradient(values: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """Return ``values`` as they are, with the parameters in their graph, so that these get a gradient of zero.

    Other processes wait for one.
    """
    tied: Tensor = _ZeroGradient.apply(values, *parameters) if parameters else values
    return tied


class _ZeroGradient(torch.autograd.Function):
    """Returns the first argument as it is, and gives the others a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, *parameters: Tensor) -> Tensor:
        # As attributes: nothing reads their values, which FSDP frees before backward.
        ctx.parameters = parameters
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return (*gradients, *(torch.zeros_like(parameter) for parameter in ctx.parameters))
