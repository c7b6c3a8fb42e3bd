"""Nemotron 3 Nano Omni: images of any size in one sequence, videos in tubelets of two frames."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from emma_adapter import MediaLayout, ProjectorCall

from .any_size import AnySizeFamily
from .llava_next import frames_of


class NemotronHOmniFamily(AnySizeFamily):
    """Features ``[sum(h * w), 4 * D]`` of all images, or ``[tubelets, h * w, 4 * D]`` of all videos, row by row.

    A pixel shuffle before the projector makes one visual token of each square of patches. Vision experts see the
    patches before it, behind the tokens of the tower's own that each image and tubelet begins with.
    """

    model_types = ("nemotron_h_omni",)
    modalities = ("image", "video")
    size_arguments = ("image_grid_hw",)
    cannot_draw = "its language model has layers of linear attention, which keep no keys that a picture could read"

    def inner(self, model: nn.Module) -> nn.Module:
        """Return the model itself: it has no inner one."""
        return model

    def visual_dim(self, inner: nn.Module) -> int:
        config: Any = inner.config
        return int(config.vision_hidden_size) * self._shuffle(inner) ** 2

    def placeholder_id(self, inner: nn.Module, modality: str) -> int:
        """Return the token of images: the processor writes it for videos, too."""
        return super().placeholder_id(inner, "image")

    def layout(self, call: ProjectorCall) -> MediaLayout:
        config: Any = call.inner.config
        if call.modality == "image":
            sizes = [(1, height, width) for height, width in torch.as_tensor(call.size("image_grid_hw")).tolist()]
        else:
            videos, tubelets = frames_of(call)
            assert call.pixel_shape is not None
            height, width = (side // config.vision_config.patch_size for side in call.pixel_shape[-2:])
            sizes = [(tubelets, height, width)] * videos
        shuffle = self._shuffle(call.inner)
        if call.visual_tokens.shape[-1] == config.vision_hidden_size:
            # In the vision tower, which puts tokens of its own before the patches.
            own = config.vision_config.num_summary_tokens
            grids = [(1, own + height * width) for entries, height, width in sizes for _ in range(entries)]
        else:
            grids = [(height // shuffle, width // shuffle) for entries, height, width in sizes for _ in range(entries)]
        return MediaLayout(
            tokens=[entries * height * width // shuffle**2 for entries, height, width in sizes],
            entries=[entries for entries, _, _ in sizes],
            grids=grids,
            packed=True,
        )

    @staticmethod
    def _shuffle(inner: nn.Module) -> int:
        config: Any = inner.config
        return int(1 / config.downsample_ratio)
