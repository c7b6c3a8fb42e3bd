"""Fusions with one thing changed, for the ablation alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from emma_adapter import EmmaConfig, Fusion, register_fusion
from emma_adapter.alignment.fusion import AttentionFusion, LinearFusion
from emma_adapter.alignment.fusion.layers import CastingLinear, add_update

#: What transformers initialises weights with (``initializer_range``), in BERT, CLIP and Llama alike.
USUAL_STD = 0.02


class UsualInitialisation(AttentionFusion):
    """Queries, keys and query term per position start with a standard deviation of 0.02."""

    def __init__(self, config: EmmaConfig) -> None:
        super().__init__(config)
        attention = self.cross_attention
        for weight in (attention.query.weight, attention.key.weight, attention.position):
            if weight is not None:
                nn.init.normal_(weight, std=USUAL_STD)


class NoPosition(AttentionFusion):
    """The library's own form for images without a fixed number of visual tokens: the content makes the query alone,
    with the same variance."""

    def __init__(self, config: EmmaConfig) -> None:
        super().__init__(config.replace(num_visual_tokens=None, visual_grid=None))


class OpenOutput(AttentionFusion):
    """The output projection starts as ``nn.Linear`` does, so that an untrained adapter is not the identity."""

    def __init__(self, config: EmmaConfig) -> None:
        super().__init__(config)
        assert config.visual_dim
        self.cross_attention.output = CastingLinear(config.inner_dim, config.visual_dim)


class ScalarGate(OpenOutput):
    """``V + g CrossAttention(V, T)`` with ``g = 0`` at first. The zero moves from the output projection into the gate:
    were both zero, neither would ever get a gradient."""

    has_kernel = False

    def __init__(self, config: EmmaConfig) -> None:
        super().__init__(config)
        self.gate = nn.Parameter(torch.zeros(()))

    def apply_update(self, visual_tokens: Tensor, update: Tensor) -> Tensor:
        return add_update(visual_tokens, self.gate.to(update.dtype) * update)


class ProjectionOnly(LinearFusion):
    """``V + mean_t GELU(T P^T + p)``: the alignment is fixed to adding the mean of the projected instruction to every
    visual token, and ``P`` and ``p``, which alone are trained, start at zero, where GELU has a gradient."""

    has_kernel = False

    def __init__(self, config: EmmaConfig) -> None:
        super().__init__(config)
        projection = self.instruction_projection
        nn.init.zeros_(projection.weight)
        assert projection.bias is not None
        nn.init.zeros_(projection.bias)
        for name, parameter in list(self.named_parameters(recurse=False)):
            delattr(self, name)
            self.register_buffer(name, parameter.detach(), persistent=False)
        self.text_weight.fill_(1 / self.text_weight.shape[1])


class AlignmentOnly(LinearFusion):
    """``dW_img``, ``W_txt`` and ``b`` are trained; ``P`` and ``p`` stay random, as they are initialised: the widths of
    instruction and visual tokens differ, so that there has to be a projection."""

    def __init__(self, config: EmmaConfig) -> None:
        super().__init__(config)
        projection = self.instruction_projection
        for name, parameter in list(projection.named_parameters()):
            delattr(projection, name)
            projection.register_buffer(name, parameter.detach())


VARIANTS: dict[str, type[Fusion]] = {
    "attention, usual q/k initialisation": UsualInitialisation,
    "attention, no query term per position": NoPosition,
    "attention, output not zero-initialised": OpenOutput,
    "attention, scalar zero gate": ScalarGate,
    "linear, instruction projection only": ProjectionOnly,
    "linear, alignment only": AlignmentOnly,
}


def register() -> None:
    """Make them known as ``EmmaConfig(fusion=...)``, in this process."""
    for name, variant in VARIANTS.items():
        register_fusion(name)(variant)
