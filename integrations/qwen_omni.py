"""Qwen2.5-Omni and Qwen3-Omni, whose thinkers see as Qwen2.5-VL and Qwen3-VL do, and hear, too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import nn

from .qwen_vl import Qwen3VLFamily, Qwen25VLFamily


class Qwen25OmniFamily(Qwen25VLFamily):
    """As Qwen2.5-VL."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen2_5_omni_thinker",)

    def inner(self, model: nn.Module) -> nn.Module:
        return _seeing_part(model)


class Qwen3OmniFamily(Qwen3VLFamily):
    """As Qwen3-VL, whose lower features go through mergers of another name here."""

    model_types = ("qwen3_omni_moe_thinker",)

    def inner(self, model: nn.Module) -> nn.Module:
        return _seeing_part(model)

    def deepstack_projectors(self, inner: nn.Module) -> Sequence[nn.Module]:
        return list(inner.get_submodule("visual.merger_list").children())


def _seeing_part(model: nn.Module) -> nn.Module:
    # Older transformers have the towers in the model with the language-model head.
    return model if hasattr(model, "visual") else model.get_submodule("model")
