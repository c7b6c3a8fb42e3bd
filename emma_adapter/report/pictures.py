"""Pictures for a page: as the vision encoder saw them, and as data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

#: Pixels; a phone has three for each of CSS's.
_LONGEST = 640
_SMALLEST_SHOWN = 160
_JPEG_QUALITY = 82


def encoded_pictures(inputs: Mapping[str, Any], processor: Any) -> list[Any]:
    """The images, or tiles, that a batch of one row gives the vision encoder, as PIL images. Empty if the batch holds
    them as patches, or the processor doesn't say how it normalised them."""
    from PIL import Image

    pixels = inputs.get("pixel_values")
    maker = getattr(processor, "image_processor", None)
    if not isinstance(pixels, torch.Tensor) or pixels.ndim not in (4, 5) or pixels.shape[-3] != 3:
        return []
    values = pixels.flatten(0, -4).float().cpu()
    if getattr(maker, "do_normalize", False):
        mean, std = (torch.tensor(getattr(maker, name), dtype=torch.float32) for name in ("image_mean", "image_std"))
        values = values * std.view(-1, 1, 1) + mean.view(-1, 1, 1)
    if getattr(maker, "do_rescale", True):
        values = values / (getattr(maker, "rescale_factor", None) or 1 / 255)
    array = values.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(np.ascontiguousarray(one)) for one in array]


def data_uri(image: Any) -> str:
    """A PIL image as it can stand in a page: not larger than it is shown, and not blurred if it is tiny."""
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
    """Whether its pixels are to be seen as squares when it is enlarged."""
    return max(image.size) < _SMALLEST_SHOWN
