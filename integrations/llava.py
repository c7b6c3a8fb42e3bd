"""LLaVA: ``LlavaForConditionalGeneration``, with CLIP, SigLIP or Pixtral vision towers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from emma_adapter import MediaLayout, ModelFamily, RoutingError

# Tokens before the patches in the output of vision towers seen in LLaVAs. Of another tower the number of visual tokens
# isn't known beforehand, and the adapter learns no positions.
_LEADING_TOKENS = {"clip_vision_model": 1, "dinov2": 1, "siglip_vision_model": 0, "vit": 1}

# Pixtral has no native size; learned positions live on this grid and are resampled to each image's own.
_DYNAMIC_GRID = (24, 24)


class LlavaFamily(ModelFamily):
    """Features ``[images, N, D]`` of the vision tower; a Pixtral tower packs all images: ``[1, sum(N), D]``."""

    model_types = ("llava",)
    size_arguments = ("image_sizes",)

    def projector(self, inner: nn.Module) -> nn.Module:
        return inner.get_submodule("multi_modal_projector")

    def visual_dim(self, inner: nn.Module) -> int:
        config: Any = inner.config
        layers = config.vision_feature_layer
        return int(config.vision_config.hidden_size) * (1 if isinstance(layers, int) else len(layers))

    def visual_size(self, inner: nn.Module) -> tuple[int | None, tuple[int, int] | None]:
        if not self.has_fixed_size(inner):
            return _DYNAMIC_GRID[0] * _DYNAMIC_GRID[1], _DYNAMIC_GRID
        config: Any = inner.config
        vision = config.vision_config
        leading = _LEADING_TOKENS.get(vision.model_type)
        if leading is None or not all(isinstance(value, int) for value in (vision.image_size, vision.patch_size)):
            return None, None
        side = vision.image_size // vision.patch_size
        # The strategy "default" drops the first token; SigLIP, which has only patches, is used with "full".
        extra = leading - int(config.vision_feature_select_strategy == "default")
        return side * side + extra, (side, side) if extra == 0 else None

    def has_fixed_size(self, inner: nn.Module) -> bool:
        config: Any = inner.config
        return getattr(config.vision_config, "model_type", None) != "pixtral"

    def placeholder_id(self, inner: nn.Module, modality: str) -> int:
        config: Any = inner.config
        return int(config.image_token_id)

    def layout(
        self, inner: nn.Module, modality: str, visual_tokens: Tensor, sizes: Mapping[str, Any], placeholders: int
    ) -> MediaLayout:
        if not self.has_fixed_size(inner):
            return self._packed_layout(inner, visual_tokens, sizes)
        num_images = visual_tokens.shape[0]
        # Divided rather than taken from the shape: a projector may pool an image to fewer tokens.
        if num_images == 0 or placeholders == 0 or placeholders % num_images:
            raise RoutingError(
                f"{num_images} images can't share {placeholders} placeholder tokens evenly: let the model's processor "
                "make text and images together"
            )
        return MediaLayout(tokens=[placeholders // num_images] * num_images, units=[1] * num_images)

    def _packed_layout(self, inner: nn.Module, visual_tokens: Tensor, sizes: Mapping[str, Any]) -> MediaLayout:
        config: Any = inner.config
        image_sizes = sizes.get("image_sizes")
        if image_sizes is None:
            raise RoutingError("a LLaVA with a Pixtral vision tower needs image_sizes, as its processor returns them")
        patch = config.vision_config.patch_size
        grids = [(int(height) // patch, int(width) // patch) for height, width in torch.as_tensor(image_sizes).tolist()]
        lengths = [height * width for height, width in grids]
        if visual_tokens.shape[0] != 1 or visual_tokens.shape[1] != sum(lengths):
            raise RoutingError(
                f"image_sizes announce {sum(lengths)} visual tokens, but the vision tower gave "
                f"{list(visual_tokens.shape[:2])}"
            )
        return MediaLayout(tokens=lengths, units=lengths, packed=True, grids=grids)
