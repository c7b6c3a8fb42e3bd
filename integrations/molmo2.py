"""Molmo2: each image as a whole and once more in detail, both pooled, with the tokens of all images in one sequence."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from emma_adapter import MediaLayout, ProjectorCall
from emma_adapter.models.families import WHOLE_IMAGE, Box

from .any_size import AnySizeFamily


class Molmo2Family(AnySizeFamily):
    """Features ``[sum(h * w), D]``, row by row: of each image a small grid, then a large one; of a video its frames.

    Both grids show the whole image. The large one is put together from overlapping crops when it is pooled.
    """

    model_types = ("molmo2",)
    projector_path = "multi_modal_projector.image_projector"
    modalities = ("image", "video")
    size_arguments = ("image_grids", "image_token_pooling", "video_grids")
    tiles = True
    cannot_draw = "the crops that its processor makes can't be put together to the picture that they show"

    def visual_dim(self, inner: nn.Module) -> int:
        config: Any = inner.config
        return int(config.adapter_config.hidden_size)

    def layout(self, call: ProjectorCall) -> MediaLayout:
        sizes = torch.as_tensor(call.size(f"{call.modality}_grids")).tolist()
        if call.modality == "image":
            media = [[(small_h, small_w), (h, w)] for small_h, small_w, h, w in sizes]
        else:
            media = [[(h, w)] * frames for frames, h, w in sizes]
        tokens = [sum(height * width for height, width in grids) for grids in media]
        if call.visual_tokens.ndim == 3:
            # In the vision tower: [crops, N, D], or the frames.
            crops = _crops(call, tokens) if call.modality == "image" else [len(grids) for grids in media]
            return MediaLayout(tokens=tokens, entries=crops)
        return MediaLayout(
            tokens=tokens,
            entries=[len(grids) for grids in media],
            grids=[grid for grids in media for grid in grids],
            packed=True,
        )

    def boxes(self, call: ProjectorCall, layout: MediaLayout) -> Sequence[Box | None]:
        return [WHOLE_IMAGE] * sum(layout.entries)


def _crops(call: ProjectorCall, tokens: list[int]) -> list[int]:
    """Return how many crops each image has, by the last patch that its tokens are pooled from."""
    pooling: Tensor = torch.as_tensor(call.size("image_token_pooling"))
    ends = [int(places.max()) // call.visual_tokens.shape[1] + 1 for places in pooling.split(tokens)]
    return [end - start for start, end in pairwise([0, *ends])]
