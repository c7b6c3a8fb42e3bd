"""The formulation of the paper's authors (github.com/SaraGhazanfari/EMMA, ``clip_encoder.py``), as a baseline."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emma_adapter.alignment.fusion import LinearFusion
from emma_adapter.alignment.fusion.layers import CastingLinear


class AuthorsAlignment(nn.Module):
    """One ``nn.Linear`` from all tokens, visual and instruction, to the visual ones, applied to their transpose.

    Its weight is ``[I + dW_img | W_txt]``, taken from ``fusion``.

    Args:
        fusion: whose function is computed.
        as_shipped: also what surrounds the product in their code: a comparison of result and input in every call,
            which makes a GPU wait, and the copy by which the projector makes the transposed result contiguous.
    """

    def __init__(self, fusion: LinearFusion, *, as_shipped: bool = False) -> None:
        super().__init__()
        self.as_shipped = as_shipped
        projection = fusion.instruction_projection
        assert isinstance(projection, CastingLinear)
        width, instruction_width = projection.weight.shape
        self.projection = nn.Linear(instruction_width, width)
        self.projection.load_state_dict(projection.state_dict())
        num_visual, num_instruction = fusion.text_weight.shape
        self.infusion = nn.Linear(num_visual + num_instruction, num_visual)
        with torch.no_grad():
            self.infusion.weight[:, :num_visual] = torch.eye(num_visual) + fusion.image_weight
            self.infusion.weight[:, num_visual:] = fusion.text_weight
            self.infusion.bias.copy_(fusion.bias)

    def forward(self, visual_tokens: Tensor, instruction_tokens: Tensor) -> Tensor:
        projected = F.gelu(self.projection(instruction_tokens))
        channels_first = torch.cat([visual_tokens, projected], dim=1).permute(0, 2, 1)
        mixed: Tensor = self.infusion(channels_first).permute(0, 2, 1)
        if not self.as_shipped:
            return mixed
        if torch.equal(visual_tokens, mixed):
            warnings.warn("the alignment changes nothing", stacklevel=2)
        return mixed.contiguous()
