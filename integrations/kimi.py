"""Kimi K2.5, K2.6 and K2.7: images of any size, and videos in chunks of a few frames, all in one sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from emma_adapter import MediaLayout, ProjectorCall, block_order

from .any_size import AnySizeFamily


class KimiFamily(AnySizeFamily):
    """Features ``[sum(h * w) / merge², merge², D]`` of the patches of all images, or of all chunks of all videos.

    Patches come in blocks of ``merge x merge``, each of which the projector makes one token of, and the blocks row by
    row. The vision tower averages the frames of a chunk. The call doesn't tell which chunks are of one video: each is a
    medium of its own.
    """

    model_types = ("kimi_k25",)
    projector_path = "mm_projector"
    modalities = ("image", "video")
    size_arguments = ("image_grid_thw", "video_grid_thw")

    def visual_dim(self, inner: nn.Module) -> int:
        config: Any = inner.config
        return int(config.vision_config.hidden_size)

    def projector_merge(self, inner: nn.Module) -> int:
        config: Any = inner.config
        return int(config.vision_config.merge_kernel_size[0])

    def layout(self, call: ProjectorCall) -> MediaLayout:
        merge = self.projector_merge(call.inner)
        sizes = torch.as_tensor(call.size(f"{call.modality}_grid_thw")).tolist()
        # Vision experts ask inside the tower, whose tokens, [sum(t * h * w), D], are not averaged yet.
        averaged = call.visual_tokens.ndim == 3
        entries = [1 if averaged else frames for frames, _, _ in sizes]
        grids = [
            (height, width) for number, (_, height, width) in zip(entries, sizes, strict=True) for _ in range(number)
        ]
        return MediaLayout(
            tokens=[height * width // merge**2 for _, height, width in sizes],
            entries=entries,
            grids=grids,
            packed=True,
            orders={grid: block_order(grid, merge) for grid in set(grids)},
        )
