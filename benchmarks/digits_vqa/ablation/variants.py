"""Fusions of the ablation alone: those of the library with one thing changed, and one of two steps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from emma_adapter import EmmaConfig, Fusion, register_fusion
from emma_adapter.alignment.fusion import AttentionFusion, LinearFusion, ModulationFusion
from emma_adapter.alignment.fusion.cross_attention import CrossAttention
from emma_adapter.alignment.fusion.layers import CastingLayerNorm, CastingLinear, add_update
from emma_adapter.alignment.fusion.packed_images import Grid

#: What transformers initialises weights with (``initializer_range``), in BERT, CLIP and Llama alike.
USUAL_STD = 0.02
#: Of queries and keys of the library's fusions, of inputs of variance 1: attention is uneven from the start.
UNEVEN_STD = 1.5


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


class TwoStepAttention(CrossAttention):
    """Visual tokens of ``inner_dim`` channels attend to the instruction, to one another, and to the instruction again;
    each time what they get is added. Keys and values of the instruction are the same both times."""

    def __init__(self, config: EmmaConfig) -> None:
        super().__init__(config)
        inner = config.inner_dim
        self.exchange_norm, self.again_norm = CastingLayerNorm(inner), CastingLayerNorm(inner)
        self.exchange_query = CastingLinear(inner, inner)
        self.exchange_key = CastingLinear(inner, inner, bias=False)
        self.exchange_value = CastingLinear(inner, inner)
        self.exchange_output = CastingLinear(inner, inner)
        self.again = CastingLinear(inner, inner)
        for layer in (self.exchange_query, self.exchange_key, self.again):
            nn.init.normal_(layer.weight, std=UNEVEN_STD / inner**0.5)

    def forward(
        self, visual_tokens: Tensor, instruction_tokens: Tensor, instruction_mask: Tensor | None, grid: Grid | None
    ) -> Tensor:
        keys, values = self._keys_and_values(instruction_tokens, instruction_mask)
        x = self.query(self.visual_norm(visual_tokens))
        positions = self.positions(visual_tokens.shape[1], grid)
        if positions is not None:
            x = x + positions.to(x.dtype)
        x = x + self._attend(x, keys, values, instruction_mask)
        seen = self.exchange_norm(x)
        exchanged = self._attend(
            self.exchange_query(seen), self.exchange_key(seen), self.exchange_value(seen), mask=None
        )
        x = x + self.exchange_output(exchanged)
        x = x + self._attend(self.again(self.again_norm(x)), keys, values, instruction_mask)
        return self.output(x)

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None:
            # A softmax over no key is NaN: an empty instruction attends to its blanked padding.
            mask = (mask | ~mask.any(dim=1, keepdim=True))[:, None, None, :]
        attended = F.scaled_dot_product_attention(
            self._split_heads(queries), self._split_heads(keys), self._split_heads(values), attn_mask=mask
        )
        return rearrange(attended, "b h n d -> b n (h d)")


class TwoSteps(ModulationFusion):
    """``modulation`` whose mask two steps draw."""

    has_kernel = False

    def __init__(self, config: EmmaConfig) -> None:
        super().__init__(config)
        self.cross_attention = TwoStepAttention(config)


TWO_STEPS = "modulation in two steps"
#: ``inner_dim`` at which it has about the parameters of ``modulation``.
TWO_STEPS_WIDTH = 64

VARIANTS: dict[str, type[Fusion]] = {
    "attention, usual q/k initialisation": UsualInitialisation,
    "attention, no query term per position": NoPosition,
    "attention, output not zero-initialised": OpenOutput,
    "attention, scalar zero gate": ScalarGate,
    "linear, instruction projection only": ProjectionOnly,
    "linear, alignment only": AlignmentOnly,
    TWO_STEPS: TwoSteps,
}


def register() -> None:
    """Make them known as ``EmmaConfig(fusion=...)``, in this process."""
    for name, variant in VARIANTS.items():
        register_fusion(name)(variant)
