"""Florence-2: an encoder-decoder, whose encoder reads the picture and the whole prompt."""

from __future__ import annotations

from typing import Any

from torch import nn

from emma_adapter import MediaLayout, ModelFamily, ProjectorCall

# The processor makes pictures of 768 x 768 pixels, of which the vision tower makes this grid; no config says so.
_GRID = (24, 24)


class Florence2Family(ModelFamily):
    """Features ``[images, 1 + N, D]``: the mean of an image's tokens, then the tokens, row by row.

    Labels are the decoder's: what the encoder reads is the instruction, all of it.
    """

    model_types = ("florence2",)
    # The projector itself gets [images, D, height, width], and makes the tokens before its linear layer.
    projector_path = "multi_modal_projector.image_projection"

    def visual_dim(self, inner: nn.Module) -> int:
        config: Any = inner.config
        return int(config.vision_config.embed_dim[-1])

    def visual_size(self, inner: nn.Module) -> tuple[int | None, tuple[int, int] | None]:
        return _GRID[0] * _GRID[1], _GRID

    def has_fixed_size(self, inner: nn.Module) -> bool:
        return False

    def layout(self, call: ProjectorCall) -> MediaLayout:
        images = call.visual_tokens.shape[0]
        assert call.pixel_shape is not None
        height, width = (self._side_after_tower(call.inner, side) for side in call.pixel_shape[-2:])
        return MediaLayout(
            tokens=[1 + height * width] * images,
            entries=[2] * images,
            grids=[(1, 1), (height, width)] * images,
            packed=True,
        )

    @staticmethod
    def _side_after_tower(inner: nn.Module, pixels: int) -> int:
        config: Any = inner.config
        vision = config.vision_config
        for kernel, stride, padding in zip(vision.patch_size, vision.patch_stride, vision.patch_padding, strict=True):
            pixels = (pixels + 2 * padding - kernel) // stride + 1
        return pixels
