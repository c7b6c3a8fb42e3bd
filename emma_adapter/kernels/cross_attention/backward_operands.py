"""The operands of a backward of cross-attention, each prepared once for the kernels that share it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..launch import aligned, cdiv
from .layout import Layout, in_dtype
from .tiles import BLOCKS, configuration


@dataclass(frozen=True)
class BackwardOperands:
    """The operands of a backward, as its kernels take them."""

    grad: Tensor
    x: Tensor
    key: Tensor
    value: Tensor
    key_mask: Tensor
    instruction: Tensor | None
    cu_seqlens: Tensor | None
    norm_weight: Tensor
    norm_bias: Tensor
    query_weight: Tensor
    position: Tensor | None
    position_start: Tensor | None
    output_weight: Tensor
    output_bias: Tensor
    cast_weights: Tensor | None
    query: Tensor
    attended: Tensor
    lse: Tensor
    center: Tensor
    rstd: Tensor
    segments: int
    num_heads: int
    modulate: bool

    @property
    def tokens(self) -> int:
        return self.x.shape[0]

    @property
    def width(self) -> int:
        return self.x.shape[1]

    @property
    def inner(self) -> int:
        return self.query.shape[1]

    @cached_property
    def layout(self) -> Layout:
        return Layout.of(self.tokens, self.segments, self.cu_seqlens, self.instruction, unused=self.rstd)

    @cached_property
    def factors(self) -> tuple[Tensor, Tensor]:
        """W_q and W_o in the dtype of x."""
        return in_dtype(self.query_weight, self.output_weight, self.cast_weights, self.x.dtype)

    @cached_property
    def visual(self) -> dict[str, Tensor]:
        return {
            "grad_ptr": aligned(self.grad, self.x.dtype),
            "x_ptr": aligned(self.x),
            "lse_ptr": self.lse,
            "rstd_ptr": self.rstd,
        }

    @cached_property
    def epilogue(self) -> dict[str, Tensor]:
        bias = aligned(self.output_bias, torch.float32)
        return {"attended_ptr": self.attended, "weight_ptr": self.factors[1], "bias_ptr": bias}

    @property
    def sizes(self) -> dict[str, int]:
        return {"D": self.width, "I": self.inner, "num_heads": self.num_heads}

    @property
    def block(self) -> Mapping[str, int]:
        return BLOCKS[self.x.dtype]

    @property
    def row_blocks(self) -> int:
        return cdiv(self.tokens, self.block["BLOCK_M"])

    @property
    def inner_blocks(self) -> int:
        return cdiv(self.inner, self.block["BLOCK_I"])

    @property
    def tiles_of_update(self) -> dict[str, int]:
        """Which variant of a kernel computes the update z again."""
        return {"MODULATE": self.modulate, "ONE_TILE": self.modulate and self.inner <= self.block["BLOCK_I"]}

    def launch(self, kernel: Any, grid: tuple[int, ...], variant: dict[str, int], **arguments: Any) -> None:
        configuration(kernel, self.x.dtype, **variant).launch(grid, self.x.device, **arguments)
