"""Pictures from and for users: reading and checking them, sizes, and output types."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, DataError, ShapeError
from ..messages import plain, shown
from .autoencoder import nearest_sizes

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
#: The side of a picture if no size is given, and the area to which a reference picture's size is limited, in pixels.
_DEFAULT_SIDE, _MOST_PIXELS = 512, 1024 * 1024


def target_tensors(targets: Any, compression: int) -> list[Tensor]:
    """Return target pictures as tensors ``[3, H, W]`` in [0, 1].

    Args:
        targets: a PIL image, a list of PIL images or of tensors ``[3, H, W]``, or a tensor ``[B, 3, H, W]`` in [0, 1].
        compression: the sides must be multiples of it.

    Raises:
        DataError: if one can't be read, or isn't in [0, 1].
        ShapeError: if one has another shape or size.
    """
    if isinstance(targets, Tensor) and targets.ndim == 4:
        pictures = list(targets)
    else:
        pictures = list(targets) if isinstance(targets, (list, tuple)) else [targets]
    return [_target(picture, compression) for picture in pictures]


def _target(picture: Any, compression: int) -> Tensor:
    if not isinstance(picture, Tensor):
        array = np.array(rgb(picture), dtype=np.float32) / 255
        picture = torch.from_numpy(array).permute(2, 0, 1)
    if picture.ndim != 3 or len(picture) != 3 or not picture.is_floating_point():
        raise ShapeError(
            f"a target must be a PIL image or a float tensor [3, H, W] (a batch: [B, 3, H, W]) in [0, 1]; got "
            f"{picture.dtype} {list(picture.shape)}"
        )
    check_size(picture.shape[1], picture.shape[2], compression)
    if not bool((picture >= 0).all() and (picture <= 1).all()):
        raise DataError(
            "a target has values outside of [0, 1], or NaN: divide bytes by 255, and don't normalize with the "
            "processor's mean and deviation"
        )
    return picture


def rgb(picture: Any) -> Any:
    """Convert a PIL image to RGB, rotated as its EXIF data say.

    Raises:
        DataError: if it is not a PIL image, or its file can't be read.
    """
    from PIL import Image, ImageOps

    if not isinstance(picture, Image.Image):
        raise DataError(f"a picture must be a PIL image, as PIL.Image.open(path) returns; got {shown(type(picture))}")
    try:
        upright = ImageOps.exif_transpose(picture)
        return (picture if upright is None else upright).convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(
            f"the picture {shown(getattr(picture, 'filename', '') or picture.size)} can't be read "
            f"({type(error).__name__}: {plain(str(error), 200)}): download or copy it again of the file"
        ) from error


def reference_lists(images: Any, rows: int) -> list[list[Any]]:
    """Return the reference pictures of each row, in RGB.

    Args:
        images: None; one PIL image for all rows; or a list with None, an image, or a list of images for each row.
        rows: how many prompts there are.

    Raises:
        DataError: if the list has another length, or a picture can't be read.
    """
    if images is None:
        return [[] for _ in range(rows)]
    if not isinstance(images, (list, tuple)):
        picture = rgb(images)
        return [[picture] for _ in range(rows)]
    if len(images) != rows:
        raise DataError(
            f"{len(images)} entries of reference pictures for {rows} prompts: give one for each prompt (None, a "
            "picture, or a list of pictures), or one picture for all"
        )
    return [
        [] if entry is None else [rgb(each) for each in entry] if isinstance(entry, (list, tuple)) else [rgb(entry)]
        for entry in images
    ]


def check_size(height: int, width: int, compression: int) -> None:
    """Check that height and width are multiples of the compression.

    Raises:
        ShapeError: naming the nearest size that is allowed.
    """
    sides = (height, width)
    if not all(isinstance(side, int) and not isinstance(side, bool) for side in sides) or any(
        side < 1 or side % compression for side in sides
    ):
        nearest = "" if not all(isinstance(side, int) for side in sides) else _nearest(height, width, compression)
        raise ShapeError(
            f"height and width must be multiples of the autoencoder's {compression} pixels, and are {height} x {width}"
            f"{nearest}"
        )


def _nearest(height: int, width: int, compression: int) -> str:
    near = nearest_sizes(height, width, compression)
    return f": take {near[0]} x {near[1]}"


def output_size(
    height: int | None, width: int | None, references: Sequence[Sequence[Any]], compression: int
) -> tuple[int, int]:
    """Return the height and width to draw: those given, or else the first reference picture's, or else 512 x 512.

    The reference picture's are scaled down to at most a megapixel, and rounded to multiples of the compression.

    Raises:
        ShapeError: if a given one is not a multiple of the compression.
    """
    first = next((pictures[0] for pictures in references if pictures), None)
    original = (_DEFAULT_SIDE, _DEFAULT_SIDE) if first is None else (first.height, first.width)
    scale = min(1.0, math.sqrt(_MOST_PIXELS / (original[0] * original[1])))
    default = nearest_sizes(round(original[0] * scale), round(original[1] * scale), compression)
    size = (default[0] if height is None else height, default[1] if width is None else width)
    check_size(*size, compression)
    return size


def converted(pictures: Tensor, output_type: str) -> Any:
    """Convert pictures ``[B, 3, H, W]`` in [0, 1] to ``"np"`` (``[B, H, W, 3]``) or ``"pil"``; ``"pt"`` leaves them."""
    if output_type == "pt":
        return pictures
    arrays = pictures.permute(0, 2, 3, 1).cpu().numpy()
    if output_type == "np":
        return arrays
    from PIL import Image

    return [Image.fromarray((array * 255).round().astype("uint8")) for array in arrays]


def check_output_type(output_type: str) -> None:
    """Check an output type.

    Raises:
        ConfigError: if it is none of ``OUTPUT_TYPES``.
    """
    if output_type not in OUTPUT_TYPES:
        raise ConfigError(f"output_type must be one of {list(OUTPUT_TYPES)}; got {shown(output_type)}")
