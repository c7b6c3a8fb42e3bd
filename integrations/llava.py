"""LLaVA, ``LlavaForConditionalGeneration``, with CLIP, SigLIP or Pixtral vision towers; and VipLLaVA."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from emma_adapter import MediaLayout, ModelFamily, ProjectorCall

from .any_size import GRID
from .llava_original import LlavaOriginalFamily

# Tokens before the patches in the output of vision towers seen in LLaVAs. For other towers the number of visual tokens
# isn't known in advance, and the adapter learns no positions.
_LEADING_TOKENS = {"clip_vision_model": 1, "dinov2": 1, "siglip_vision_model": 0, "vit": 1}


class LlavaFamily(ModelFamily):
    """Features ``[images, N, D]`` of the vision tower; a Pixtral tower packs all images: ``[1, sum(N), D]``."""

    model_types: ClassVar[tuple[str, ...]] = ("llava",)
    size_arguments: ClassVar[tuple[str, ...]] = ("image_sizes",)

    def for_model(self, model: nn.Module) -> ModelFamily:
        # LLaVA's own classes had this model type before transformers had a LLaVA.
        is_original = hasattr(getattr(model, "model", None), "mm_projector")
        return LlavaOriginalFamily() if is_original else self

    def visual_dim(self, inner: nn.Module) -> int:
        config: Any = inner.config
        # transformers < 5.18 names it vision_feature_layers for VipLLaVA.
        layers = getattr(config, "vision_feature_layer", None)
        layers = config.vision_feature_layers if layers is None else layers
        return int(config.vision_config.hidden_size) * (1 if isinstance(layers, int) else len(layers))

    def visual_size(self, inner: nn.Module) -> tuple[int | None, tuple[int, int] | None]:
        if not self.has_fixed_size(inner):
            return GRID[0] * GRID[1], GRID
        config: Any = inner.config
        vision = config.vision_config
        leading = _LEADING_TOKENS.get(vision.model_type)
        if leading is None or not all(isinstance(value, int) for value in (vision.image_size, vision.patch_size)):
            return None, None
        side = vision.image_size // vision.patch_size
        # The strategy "default" drops the first token; SigLIP, which has only patches, is used with "full".
        extra = leading - int(self.drops_first_token(inner))
        return side * side + extra, (side, side) if extra == 0 else None

    def drops_first_token(self, inner: nn.Module) -> bool:
        config: Any = inner.config
        return bool(config.vision_feature_select_strategy == "default")

    def has_fixed_size(self, inner: nn.Module) -> bool:
        config: Any = inner.config
        return getattr(config.vision_config, "model_type", None) != "pixtral"

    def layout(self, call: ProjectorCall) -> MediaLayout:
        if self.has_fixed_size(call.inner):
            return super().layout(call)
        config: Any = call.inner.config
        return pixtral_layout(call, patch=config.vision_config.patch_size)


class VipLlavaFamily(LlavaFamily):
    """Features ``[images, N, layers * D]`` of several layers of the vision tower, without the class token."""

    model_types = ("vipllava",)

    def drops_first_token(self, inner: nn.Module) -> bool:
        return True


def pixtral_layout(call: ProjectorCall, *, patch: int, merge: int = 1) -> MediaLayout:
    """Return the layout of a Pixtral tower's output, which has all images in one sequence.

    ``merge ** 2`` visual tokens become one token of the language model.
    """
    sizes = torch.as_tensor(call.size("image_sizes")).tolist()
    grids = [(int(height) // patch, int(width) // patch) for height, width in sizes]
    return MediaLayout(
        tokens=[(height // merge) * (width // merge) for height, width in grids],
        entries=[1] * len(grids),
        grids=grids,
        packed=True,
    )
