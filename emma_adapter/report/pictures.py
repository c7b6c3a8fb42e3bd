"""Pictures for a page: recovered from the vision encoder's inputs, and as data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

#: In pixels; a phone has three for each pixel of CSS.
_LONGEST = 640
_SMALLEST_SHOWN = 160
_JPEG_QUALITY = 82


def encoded_pictures(inputs: Mapping[str, Any], processor: Any) -> list[Any]:
    """Return the images, or tiles, that a batch of one row gives the vision encoder, as PIL images.

    The list is empty if the batch holds them as patches.
    """
    from PIL import Image

    pixels = inputs.get("pixel_values")
    image_processor = getattr(processor, "image_processor", None)
    if not isinstance(pixels, torch.Tensor) or pixels.ndim not in (4, 5) or pixels.shape[-3] != 3:
        return []
    values = pixels.flatten(0, -4).float().cpu()
    if getattr(image_processor, "do_normalize", False):
        mean, std = (
            torch.tensor(getattr(image_processor, name), dtype=torch.float32) for name in ("image_mean", "image_std")
        )
        values = values * std.view(-1, 1, 1) + mean.view(-1, 1, 1)
    if getattr(image_processor, "do_rescale", True):
        values = values / (getattr(image_processor, "rescale_factor", None) or 1 / 255)
    array = values.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(np.ascontiguousarray(picture)) for picture in array]


def data_uri(image: Any) -> str:
    """Return a PIL image as a data URI, no larger than a page shows it, and without loss if it is tiny."""
    from PIL import Image

    image = image.convert("RGB")
    longest = max(image.size)
    if longest > _LONGEST:
        scale = _LONGEST / longest
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    # Few pixels are exact and small in PNG; photographs are ten times smaller in JPEG.
    kind, options = ("PNG", {}) if longest < _SMALLEST_SHOWN else ("JPEG", {"quality": _JPEG_QUALITY})
    image.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def is_tiny(image: Any) -> bool:
    """Return whether an image is so small that its pixels are to be seen as squares when it is enlarged."""
    return max(image.size) < _SMALLEST_SHOWN
