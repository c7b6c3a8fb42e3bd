"""MiniCPM-V 4.6 and 4.7: an image and its slices, each of any size, all in one sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from emma_adapter import MediaLayout, ProjectorCall

from .any_size import AnySizeFamily

#: Side of the square of patches that the vision tower itself merges into one.
_TOWER_MERGE = 2


class MiniCPMVFamily(AnySizeFamily):
    """Features ``[1, sum(h * w), D]`` of all images, slices and frames, row by row.

    The tower merges squares of patches, but not with ``downsample_mode="4x"``, and vision experts may ask before it
    does: the number of tokens tells. The call doesn't tell which slices are of one image, nor which frames of one
    video: each is a medium of its own.
    """

    model_types = ("minicpmv4_6", "minicpmv4_7")
    projector_path = "merger"
    modalities = ("image", "video")
    size_arguments = ("target_sizes", "target_sizes_videos")
    tiles = True

    def visual_dim(self, inner: nn.Module) -> int:
        config: Any = inner.config
        return int(config.vision_config.hidden_size)

    def projector_merge(self, inner: nn.Module) -> int:
        config: Any = inner.config
        return int(config.merge_kernel_size[0]) ** int(config.merger_times)

    def layout(self, call: ProjectorCall) -> MediaLayout:
        patches = torch.as_tensor(call.size("target_sizes" if call.modality == "image" else "target_sizes_videos"))
        are_merged = call.visual_tokens.shape[:-1].numel() < int(patches.prod(-1).sum())
        grids = (patches // _TOWER_MERGE if are_merged else patches).tolist()
        merge = self.projector_merge(call.inner)
        return MediaLayout(
            tokens=[height * width // merge**2 for height, width in grids],
            entries=[1] * len(grids),
            grids=grids,
            packed=True,
        )
