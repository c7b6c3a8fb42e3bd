"""What is measured: shapes of real models, and inputs of these shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from emma_adapter.alignment.fusion.packed_images import Packing

Phase = Literal["forward", "forward+backward"]
PHASES: tuple[Phase, ...] = ("forward", "forward+backward")
BATCHES = (1, 4, 64)


@dataclass(frozen=True)
class Shape:
    """The visual tokens of a model. With ``grids``, those of several images lie one after another in one row."""

    name: str
    num_tokens: int
    dim: int
    grids: tuple[tuple[int, int], ...] = ()
    instruction_tokens: int = 77
    instruction_dim: int = 768


# Photographs, documents and icons, as a processor would resize them; together 16,384 tokens.
_GRIDS = ((64, 64), (48, 64), (64, 48), (36, 64), (32, 48), (32, 32), (24, 32), (16, 32))

LLAVA = Shape("LLaVA-1.5", 576, 1024)
SHAPES = (
    LLAVA,
    Shape("LLaVA-OneVision", 729, 1152),
    Shape("InternVL, before pixel shuffle", 1024, 1024),
    Shape("InternVL, after pixel shuffle", 256, 4096),
    Shape("Qwen2.5-VL, packed", sum(height * width for height, width in _GRIDS), 1280, grids=_GRIDS),
)
OPERATION_NAMES = ("linear", "attention", "modulation")


def applies(operation: str, shape: Shape, batch: int) -> bool:
    """A packed row is a batch already. ``linear`` has weights for one number of tokens."""
    return not shape.grids or (operation != "linear" and batch == 1)


@dataclass(frozen=True)
class Setting:
    """Where and how an operation runs. ``train_vision``: the visual tokens need a gradient too."""

    shape: Shape
    batch: int
    dtype: torch.dtype
    device: torch.device
    train_vision: bool = False


@dataclass(frozen=True)
class Inputs:
    """What all variants of an operation are given; ``grad_output`` is where backward begins."""

    visual: Tensor
    instruction: Tensor
    mask: Tensor
    grad_output: Tensor
    packing: Packing | None

    def least_bytes(self, phase: Phase, num_parameters: int) -> int:
        """What has to move whatever the implementation, each tensor once a pass, weights as wide as the tokens.

        Forward reads the visual tokens, the instruction and the weights, and writes the result. Backward reads the
        gradient of the result and all that forward read, and writes a gradient for each weight, and for the visual
        tokens if they need one. What an implementation keeps between the two isn't counted: it could be made again.
        """
        visual, weights = self.visual.nbytes, num_parameters * self.visual.element_size()
        read = visual + self.instruction.nbytes + weights
        forward = read + visual
        if phase == "forward":
            return forward
        return forward + visual + read + weights + (visual if self.visual.requires_grad else 0)


def make_inputs(setting: Setting) -> Inputs:
    shape = setting.shape
    generator = torch.Generator(setting.device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=setting.device).to(setting.dtype)

    if shape.grids:
        # Two images an instruction, as in questions that compare.
        rows = torch.arange(len(shape.grids), device=setting.device) // 2
        packing = Packing(grids=list(shape.grids), rows=rows, orders=None)
        num_instructions = (len(shape.grids) + 1) // 2
        visual = normal(shape.num_tokens, shape.dim)
    else:
        packing = None
        num_instructions = setting.batch
        visual = normal(setting.batch, shape.num_tokens, shape.dim)
    return Inputs(
        visual=visual.requires_grad_(setting.train_vision),
        instruction=normal(num_instructions, shape.instruction_tokens, shape.instruction_dim),
        mask=_mask(num_instructions, shape.instruction_tokens).to(setting.device),
        grad_output=normal(*visual.shape),
        packing=packing,
    )


def _mask(rows: int, tokens: int) -> Tensor:
    """Instructions of 8 to 40 tokens, padded as a text tower pads them."""
    lengths = torch.arange(rows) * 7 % 33 + 8
    return torch.arange(tokens) < lengths[:, None]
