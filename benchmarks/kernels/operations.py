"""The operations: one function makes all variants of one, for speed, memory and tests alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from emma_adapter import EmmaAlignment, EmmaConfig
from emma_adapter.alignment.fusion import LinearFusion
from emma_adapter.alignment.fusion.cross_attention import CrossAttentionFusion

from . import attending
from .authors import AuthorsAlignment
from .shapes import Inputs, Phase, Setting, make_inputs


@dataclass(frozen=True)
class Variant:
    """One way to compute an operation. Its first call compiles it, if it is ``compiled``."""

    run: Callable[[], Tensor]
    module: nn.Module
    compiled: bool = False


@dataclass(frozen=True)
class Operation:
    """All variants, by name; the first one is the baseline of the others. Their weights have the same values, but are
    not shared between modules."""

    inputs: Inputs
    variants: dict[str, Variant]

    @property
    def baseline(self) -> str:
        return next(iter(self.variants))

    def leaves(self, variant: Variant) -> list[Tensor]:
        """What gets a gradient."""
        return [x for x in (self.inputs.visual, *variant.module.parameters()) if x.requires_grad]

    def step(self, variant: Variant, phase: Phase) -> Callable[[], None]:
        """The call that is measured."""
        if phase == "forward":

            def forward() -> None:
                with torch.no_grad():
                    variant.run()

            return forward
        leaves = self.leaves(variant)

        def forward_and_backward() -> None:
            for leaf in leaves:
                leaf.grad = None
            variant.run().backward(self.inputs.grad_output)

        return forward_and_backward


def linear(setting: Setting) -> Operation:
    inputs = make_inputs(setting)
    alignment = _alignment("linear", setting)
    fusion = alignment.fusion
    assert isinstance(fusion, LinearFusion)
    variants = {
        name: _authors(AuthorsAlignment(fusion, as_shipped=as_shipped).to(setting.device, setting.dtype), inputs)
        for name, as_shipped in (("authors", False), ("authors, as shipped", True))
    }
    # As in the paper, all positions of the text tower count: there is no mask.
    return Operation(inputs, variants | _library(alignment, setting, lambda x: x(inputs.visual, inputs.instruction)))


def attention(setting: Setting) -> Operation:
    return _cross_attention("attention", setting)


def modulation(setting: Setting) -> Operation:
    return _cross_attention("modulation", setting)


OPERATIONS: dict[str, Callable[[Setting], Operation]] = {
    "linear": linear,
    "attention": attention,
    "modulation": modulation,
}


def _authors(module: AuthorsAlignment, inputs: Inputs) -> Variant:
    return Variant(lambda: module(inputs.visual, inputs.instruction), module)


def _cross_attention(name: str, setting: Setting) -> Operation:
    inputs = make_inputs(setting)
    alignment = _alignment(name, setting)
    fusion = alignment.fusion
    assert isinstance(fusion, CrossAttentionFusion)

    def call(module: EmmaAlignment) -> Tensor:
        output: Tensor = module(inputs.visual, inputs.instruction, inputs.mask, packing=inputs.packing)
        return output

    variants = _library(alignment, setting, call)
    gpu = setting.device.type == "cuda"
    if inputs.packing is None:
        variants["manual"] = Variant(lambda: attending.dense(fusion, inputs, attending.written_out), alignment)
        if gpu:  # On a CPU FlexAttention has no backward.
            flex = torch.compile(lambda: attending.dense(fusion, inputs, attending.flex), dynamic=False)
            variants["flex"] = Variant(flex, alignment, compiled=True)
    elif gpu:
        variants["varlen"] = Variant(attending.packed_varlen(fusion, inputs), alignment)
    return Operation(inputs, variants)


def _library(alignment: EmmaAlignment, setting: Setting, call: Callable[[EmmaAlignment], Tensor]) -> dict[str, Variant]:
    variants = {
        "eager": Variant(lambda: call(alignment), alignment),
        "compile": Variant(torch.compile(lambda: call(alignment), dynamic=False), alignment, compiled=True),
    }
    if setting.device.type == "cuda":
        triton = EmmaAlignment(alignment.config.replace(kernel="triton"))
        triton.load_state_dict(alignment.state_dict())
        triton.to(setting.device)
        variants["triton"] = Variant(lambda: call(triton), triton)
    return variants


def _alignment(fusion: str, setting: Setting) -> EmmaAlignment:
    """As after some training: no weight is zero."""
    shape = setting.shape
    # Images of any size: learned positions live on a grid of their own, which patch_model makes this large.
    grid = (24, 24) if shape.grids else None
    torch.manual_seed(0)
    config = EmmaConfig(
        fusion=fusion,
        visual_dim=shape.dim,
        instruction_dim=shape.instruction_dim,
        num_visual_tokens=None if grid else shape.num_tokens,
        visual_grid=grid,
        max_instruction_tokens=shape.instruction_tokens,
        kernel="eager",
    )
    alignment = EmmaAlignment(config)
    with torch.no_grad():
        for parameter in alignment.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return alignment.to(setting.device)
