"""Qwen3.5 and 3.6, their mixtures of experts, and Qwen4's preview: Qwen3-VL's vision tower without deepstack, before a
language model that mixes linear and full attention."""

from __future__ import annotations

from typing import Any

from torch import nn

from .qwen_vl import Qwen2VLFamily


class Qwen35Family(Qwen2VLFamily):
    """As Qwen2-VL: patches in blocks of 2 x 2, row by row."""

    model_types = ("qwen3_5", "qwen3_5_moe", "qwen4_exp")

    def visual_dim(self, inner: nn.Module) -> int:
        config: Any = inner.config
        return int(config.vision_config.hidden_size)
