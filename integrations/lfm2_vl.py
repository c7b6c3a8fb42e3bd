"""LFM2-VL: tiles and images of any size, whose patches the projector merges before its first layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from emma_adapter import MediaLayout, ProjectorCall

from .any_size import AnySizeFamily


class Lfm2VLFamily(AnySizeFamily):
    """Features ``[1, 1, images * N, D]``, row by row, each image padded to N; in old transformers one image in a call.

    They are squares of patches, side by side in a token. The projector's own input has the patches of all images
    interleaved in two rows. Each tile is an image, with placeholders of its own.
    """

    model_types = ("lfm2_vl",)
    projector_path = "multi_modal_projector.linear_1"
    size_arguments = ("spatial_shapes",)
    tiles = True
    pads_images = True
    cannot_align_projected = "it is the first of two layers, and puts out no tokens of the language model yet"

    def visual_dim(self, inner: nn.Module) -> int:
        config: Any = inner.config
        return int(config.vision_config.hidden_size * config.downsample_factor**2)

    def layout(self, call: ProjectorCall) -> MediaLayout:
        config: Any = call.inner.config
        sizes = torch.as_tensor(call.size("spatial_shapes")) // config.downsample_factor
        images = [(height, width) for height, width in sizes.tolist()]
        tokens = [height * width for height, width in images]
        shape = call.visual_tokens.shape
        if len(shape) == 3:
            # In the vision tower: [images, N, D].
            return MediaLayout(tokens=tokens, entries=[1] * len(images))
        slots = shape[:-1].numel() // len(images)
        if slots < max(tokens):
            # Older transformers, as 5.17: one image.
            return MediaLayout(
                tokens=[tokens[call.number]], entries=[1], grids=[images[call.number]], packed=True, continues=True
            )
        padding = [slots - number for number in tokens]
        # What pads an image is an entry behind it.
        grids = [[image, (1, rest)] if rest else [image] for image, rest in zip(images, padding, strict=True)]
        return MediaLayout(
            tokens=tokens,
            entries=[len(entries) for entries in grids],
            grids=[grid for entries in grids for grid in entries],
            packed=True,
        )
