"""Llama 3.2 Vision: images cut into tiles, which the language model reads by cross-attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from emma_adapter import MediaLayout, ModelFamily, ProjectorCall, RoutingError


class MllamaFamily(ModelFamily):
    """Features ``[rows, images, tiles, 1 + N, D]``: of each tile the class token, then its patches, row by row.

    An image is one placeholder in the prompt. Rows of fewer images, and images of fewer tiles, are padded: padding
    meets the instruction of its row, since words that precede a row's images see it.
    """

    model_types = ("mllama",)
    size_arguments = ("aspect_ratio_ids",)
    tiles = True
    cannot_draw = "its language model has no tokens of pictures, but reads them by cross-attention"

    def visual_dim(self, inner: nn.Module) -> int:
        config: Any = inner.config
        return int(config.vision_config.vision_output_dim)

    def visual_size(self, inner: nn.Module) -> tuple[int | None, tuple[int, int] | None]:
        config: Any = inner.config
        side = config.vision_config.image_size // config.vision_config.patch_size
        return side * side, (side, side)

    def has_fixed_size(self, inner: nn.Module) -> bool:
        return False

    def layout(self, call: ProjectorCall) -> MediaLayout:
        # 0 is no image.
        is_image = torch.as_tensor(call.size("aspect_ratio_ids")) > 0
        rows, images, tiles = call.visual_tokens.shape[:3]
        shown, announced = is_image.sum(dim=1).tolist(), call.placeholders
        if announced is not None and shown != announced.tolist():
            raise RoutingError(
                f"{shown} images of each row don't match the placeholder tokens of each row, {announced.tolist()}: let "
                "the model's processor make text and images together, with the images of each row in a list"
            )
        _, tile = self.visual_size(call.inner)
        assert tile is not None
        return MediaLayout(
            tokens=is_image.flatten().long().tolist(),
            entries=[2 * tiles] * (rows * images),
            grids=[(1, 1), tile] * (rows * images * tiles),
            packed=True,
            rows=[row for row in range(rows) for _ in range(images)],
        )
