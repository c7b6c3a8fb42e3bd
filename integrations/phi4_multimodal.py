"""Phi-4-multimodal: crops of an image put together again, and projected one image at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from emma_adapter import MediaLayout, ModelFamily, ProjectorCall


class Phi4MultimodalFamily(ModelFamily):
    """Features ``[1, N, D]`` of one image in each call of the projector.

    They are the image at full size, a separator, and the whole image at the size of a crop. Both end each line with
    a separator.
    """

    model_types = ("phi4_multimodal",)
    projector_path = "embed_tokens_extend.image_embed.img_projection_up"
    pixel_arguments: ClassVar[Mapping[str, str]] = {"image": "image_pixel_values"}
    # The mask says how much of the crops is padding, which is taken off.
    size_arguments = ("image_sizes", "image_attention_mask")
    tiles = True
    cannot_align_projected = "it is the first of two layers, and puts out no tokens of the language model yet"

    def visual_dim(self, inner: nn.Module) -> int:
        config: Any = inner.config
        return int(config.vision_config.hidden_size)

    def visual_size(self, inner: nn.Module) -> tuple[int | None, tuple[int, int] | None]:
        side = self._side_of_crop(inner)
        return side * side, (side, side)

    def has_fixed_size(self, inner: nn.Module) -> bool:
        return False

    def placeholder_id(self, inner: nn.Module, modality: str) -> int:
        config: Any = inner.config
        return int(config.vision_config.image_token_id)

    def layout(self, call: ProjectorCall) -> MediaLayout:
        config: Any = call.inner.config
        side = self._side_of_crop(call.inner)
        image_sizes = torch.as_tensor(call.size("image_sizes")).view(-1, 2)
        rows, columns = (image_sizes[call.number] // config.vision_config.crop_size).tolist()
        is_image = call.size("image_attention_mask")[call.number, 1 : 1 + rows * columns, ::2, ::2]
        is_image = is_image.reshape(rows, columns, side, side).transpose(1, 2).reshape(rows * side, columns * side)
        height, width = int(is_image[:, 0].sum()), int(is_image[0].sum())
        return MediaLayout(
            tokens=[call.visual_tokens.shape[1]],
            entries=[3],
            grids=[(height, width + 1), (1, 1), (side, side + 1)],
            packed=True,
            continues=True,
        )

    @staticmethod
    def _side_of_crop(inner: nn.Module) -> int:
        config: Any = inner.config
        patches = config.vision_config.image_size // config.vision_config.patch_size
        return int(patches + 1) // 2  # Two by two are averaged; an odd number is padded.
