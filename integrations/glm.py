"""GLM-4.1V, 4.5V and 4.6V, GLM-5.3 and GLM-OCR: images and videos of any size, all in one sequence."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from emma_adapter import MediaLayout, ProjectorCall

from .any_size import AnySizeFamily


class GlmFamily(AnySizeFamily):
    """Features ``[sum(t * h * w) / merge**2, D]`` of all images, or of all videos, row by row.

    A convolution at the end of the vision tower makes one of each square of ``merge x merge`` patches.
    """

    model_types: ClassVar[tuple[str, ...]] = ("glm4v", "glm46v", "glm4v_moe", "glm_ocr")
    projector_path = "visual.merger"
    modalities = ("image", "video")
    size_arguments = ("image_grid_thw", "video_grid_thw")

    def visual_dim(self, inner: nn.Module) -> int:
        config: Any = inner.config
        return int(config.vision_config.out_hidden_size)

    def tower_merge(self, inner: nn.Module) -> int:
        config: Any = inner.config
        return int(config.vision_config.spatial_merge_size)

    def placeholder_id(self, inner: nn.Module, modality: str) -> int:
        """Return the token of images: the processor writes it for the frames of videos, too."""
        return super().placeholder_id(inner, "image")

    def layout(self, call: ProjectorCall) -> MediaLayout:
        merge = self.tower_merge(call.inner)
        sizes = torch.as_tensor(call.size(f"{call.modality}_grid_thw")).tolist()
        sizes = [(frames, height // merge, width // merge) for frames, height, width in sizes]
        return MediaLayout(
            tokens=[frames * height * width for frames, height, width in sizes],
            entries=[frames for frames, _, _ in sizes],
            grids=[(height, width) for frames, height, width in sizes for _ in range(frames)],
            packed=True,
        )


class Glm5Family(GlmFamily):
    """As GLM-4V, but images and videos may be in one call: the tokens around a video tell it from images."""

    model_types = ("glm5_next",)

    def placeholders(self, inner: nn.Module, input_ids: Tensor) -> dict[str, Tensor]:
        config: Any = inner.config
        begun = (input_ids == config.video_start_token_id).cumsum(-1)
        ended = (input_ids == config.video_end_token_id).cumsum(-1)
        is_placeholder, is_in_video = input_ids == self.placeholder_id(inner, "image"), begun > ended
        return {"image": is_placeholder & ~is_in_video, "video": is_placeholder & is_in_video}
