"""Mistral 3: a Pixtral vision tower, images of any size in one sequence."""

from __future__ import annotations

from typing import Any

from torch import nn

from emma_adapter import MediaLayout, ProjectorCall

from .llava import LlavaFamily, pixtral_layout


class Mistral3Family(LlavaFamily):
    """Features ``[sum(h * w), D]`` of all images; the projector merges patches after they are aligned."""

    model_types = ("mistral3",)

    def has_fixed_size(self, inner: nn.Module) -> bool:
        return False

    def projector_merge(self, inner: nn.Module) -> int:
        config: Any = inner.config
        return int(config.spatial_merge_size)

    def layout(self, call: ProjectorCall) -> MediaLayout:
        config: Any = call.inner.config
        return pixtral_layout(call, patch=config.vision_config.patch_size, merge=config.spatial_merge_size)
