"""From a processor's pixels back to pictures, one for each entry that the vision tower sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UnsupportedModelError
from ..models.families import MediaLayout


def entry_pictures(processor: Any, arguments: Mapping[str, Any], layout: MediaLayout) -> list[Tensor]:
    """Return a picture ``[3, H, W]`` in [0, 1] for each entry (image or tile) of a call.

    Args:
        processor: that made the call's pixels; its normalization is undone.
        arguments: of the call: ``pixel_values``, and sizes.
        layout: of its images.

    Raises:
        UnsupportedModelError: if the layout of the pixels is unknown.
    """
    pixels = arguments["pixel_values"]
    if isinstance(pixels, (list, tuple)):
        pictures = [part for value in pixels for part in (value if value.ndim == 4 else value[None])]
    elif pixels.ndim == 2 and arguments.get("image_grid_thw") is not None:
        pictures = _from_patches(processor.image_processor, pixels, arguments["image_grid_thw"])
    elif pixels.ndim == 5 and len(pixels) == len(layout.entries):
        # Images with fewer tiles than others are padded with empty ones.
        pictures = [tile for tiles, count in zip(pixels, layout.entries, strict=True) for tile in tiles[:count]]
    elif pixels.ndim == 5:
        # Rows with fewer pictures than others are padded with zeros, as Idefics3 expects.
        pictures = [picture for picture in pixels.flatten(0, 1) if bool(picture.any())]
    elif pixels.ndim == 4:
        pictures = list(pixels)
    else:
        raise UnsupportedModelError(
            f"pixel_values of {tuple(pixels.shape)} can't be turned back into pictures for the autoencoder: use a "
            "model of a family in docs/unified.md, or prompts without pictures"
        )
    sizes = arguments.get("image_sizes")
    if layout.packed and sizes is not None:
        pictures = _cropped(pictures, sizes)
    return [_denormalized(processor.image_processor, picture) for picture in pictures]


def plain_pictures(processor: Any, arguments: Mapping[str, Any]) -> list[Tensor] | None:
    """Return the pictures ``[3, H, W]`` in [0, 1] of a call's pixels, if each is in one piece; else None.

    Args:
        processor: that made the call's pixels.
        arguments: of the call, as for :func:`entry_pictures`.
    """
    pixels = arguments["pixel_values"]
    if not isinstance(pixels, Tensor):
        return None
    if pixels.ndim == 2 and arguments.get("image_grid_thw") is not None:
        pictures = _from_patches(processor.image_processor, pixels, arguments["image_grid_thw"])
    elif pixels.ndim in (4, 5):
        # Pictures of zeros are padding.
        pictures = list(pixels) if pixels.ndim == 4 else [image for image in pixels.flatten(0, 1) if bool(image.any())]
    else:
        return None
    sizes = arguments.get("image_sizes")
    if sizes is not None and len(sizes) == len(pictures):
        pictures = _cropped(pictures, sizes)
    return [_denormalized(processor.image_processor, picture) for picture in pictures]


def _cropped(pictures: Sequence[Tensor], sizes: Any) -> list[Tensor]:
    """Crop pictures to their own (height, width): Pixtral pads all to the largest."""
    pairs = torch.as_tensor(sizes).tolist()
    return [picture[:, :height, :width] for picture, (height, width) in zip(pictures, pairs, strict=True)]


def _from_patches(image_processor: Any, patches: Tensor, grids: Any) -> list[Tensor]:
    """Return pictures from Qwen-VL's patches: in blocks of merge², blocks row by row; each ``[3, T, p, p]``, flat."""
    merge, patch, frames = (
        int(getattr(image_processor, name)) for name in ("merge_size", "patch_size", "temporal_patch_size")
    )
    pictures: list[Tensor] = []
    start = 0
    for _, height, width in torch.as_tensor(grids).tolist():
        picture_patches = patches[start : start + height * width]
        start += height * width
        shape = (height // merge, width // merge, merge, merge, 3, frames, patch, patch)
        blocks = picture_patches.view(shape)[:, :, :, :, :, 0]
        # rows, columns, row in block, column in block, channel, y, x
        pictures.append(blocks.permute(4, 0, 2, 5, 1, 3, 6).reshape(3, height * patch, width * patch))
    return pictures


def _denormalized(image_processor: Any, picture: Tensor) -> Tensor:
    picture = picture.float()
    if getattr(image_processor, "do_normalize", True):
        mean, std = (
            torch.tensor(getattr(image_processor, name), dtype=torch.float32, device=picture.device).view(3, 1, 1)
            for name in ("image_mean", "image_std")
        )
        picture = picture * std + mean
    return picture.clamp(0, 1)


def resized(pictures: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Resize pictures ``[3, H, W]`` to these (height, width), where they differ."""
    return [
        picture
        if tuple(picture.shape[1:]) == tuple(size)
        else F.interpolate(picture[None], size, mode="bicubic", antialias=True)[0].clamp(0, 1)
        for picture, size in zip(pictures, sizes, strict=True)
    ]
