"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3-VL-MoE: images and videos of any size, all in one sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from emma_adapter import MediaLayout, ProjectorCall, block_order, window_order

from .any_size import AnySizeFamily


class Qwen2VLFamily(AnySizeFamily):
    """Features ``[sum(t * h * w), D]`` of the patches of all images, or of all videos.

    Patches come in blocks of ``merge x merge``, each of which the merger makes one token of, and the blocks row by row.
    """

    model_types: ClassVar[tuple[str, ...]] = ("qwen2_vl",)
    projector_path = "visual.merger"
    modalities = ("image", "video")
    size_arguments = ("image_grid_thw", "video_grid_thw")

    def visual_dim(self, inner: nn.Module) -> int:
        config: Any = inner.config
        return int(config.vision_config.embed_dim)

    def projector_merge(self, inner: nn.Module) -> int:
        config: Any = inner.config
        return int(config.vision_config.spatial_merge_size)

    def layout(self, call: ProjectorCall) -> MediaLayout:
        config: Any = call.inner.config
        merge = self.projector_merge(call.inner)
        sizes = torch.as_tensor(call.size(f"{call.modality}_grid_thw")).tolist()
        grids = [(height, width) for frames, height, width in sizes for _ in range(frames)]
        return MediaLayout(
            tokens=[frames * height * width // merge**2 for frames, height, width in sizes],
            entries=[frames for frames, _, _ in sizes],
            grids=grids,
            packed=True,
            orders={grid: self.order(config.vision_config, grid) for grid in set(grids)},
        )

    def order(self, vision_config: Any, grid: tuple[int, int]) -> Tensor:
        """Return ``[h * w]``, the place ``y * w + x`` of each patch of a frame, in the projector's input order."""
        return block_order(grid, vision_config.spatial_merge_size)


class Qwen25VLFamily(Qwen2VLFamily):
    """As Qwen2-VL, but blocks are sorted by the attention window that they are in."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen2_5_vl",)

    def visual_dim(self, inner: nn.Module) -> int:
        config: Any = inner.config
        return int(config.vision_config.hidden_size)

    def order(self, vision_config: Any, grid: tuple[int, int]) -> Tensor:
        merge = vision_config.spatial_merge_size
        return window_order(grid, merge, vision_config.window_size // merge // vision_config.patch_size)


class Qwen3VLFamily(Qwen2VLFamily):
    """As Qwen2-VL, with deepstack: features of lower layers are projected into the language model as well."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen3_vl", "qwen3_vl_moe")

    def visual_dim(self, inner: nn.Module) -> int:
        config: Any = inner.config
        return int(config.vision_config.hidden_size)

    def deepstack_projectors(self, inner: nn.Module) -> Sequence[nn.Module]:
        return list(inner.get_submodule("visual.deepstack_merger_list").children())
