"""Gemma 4: images and frames of any shape, pooled by the vision tower, all in one sequence."""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from torch import nn

from emma_adapter import MediaLayout, ProjectorCall

from .any_size import AnySizeFamily


class Gemma4Family(AnySizeFamily):
    """Features ``[sum(h * w), D]`` of all images, or of all frames of all videos, row by row and without padding."""

    model_types = ("gemma4",)
    projector_path = "embed_vision"
    modalities = ("image", "video")
    size_arguments = ("image_position_ids", "video_position_ids", "num_frames_per_video")
    pads_images = True

    def visual_dim(self, inner: nn.Module) -> int:
        config: Any = inner.config
        return int(config.vision_config.hidden_size)

    def layout(self, call: ProjectorCall) -> MediaLayout:
        config: Any = call.inner.config
        # (x, y) of each patch of an entry, -1 where it is padded.
        positions = torch.as_tensor(call.size(f"{call.modality}_position_ids"))
        last = positions.flatten(0, -3).amax(dim=1)
        sizes = ((last + 1) // config.vision_config.pooling_kernel_size).tolist()
        grids = [(height, width) for width, height in sizes]
        if call.modality == "image":
            entries = [1] * len(grids)
        elif positions.ndim == 4:
            # Older transformers stack videos of equally many frames: [videos, frames, patches, 2].
            entries = [positions.shape[1]] * positions.shape[0]
        else:
            entries = torch.as_tensor(call.size("num_frames_per_video")).tolist()
        areas = iter([height * width for height, width in grids])
        tokens = [sum(islice(areas, number)) for number in entries]
        return MediaLayout(tokens=tokens, entries=entries, grids=grids, packed=True)
