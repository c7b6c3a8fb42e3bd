"""Maps over the image of how far the adapter moves each visual token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import AnalysisError
from ..instructions.pipeline import Instruction
from ..models.families import WHOLE_IMAGE, Box
from .observing import Model, VisualEntry, observe

Array = NDArray[np.float32]
Field = Literal["norm", "relative", "cosine", "gain"]


@dataclass(frozen=True, eq=False)
class TokenMap:
    """How far the visual tokens of one image, tile or frame moved: V is the vision encoder's, V' the adapter's.

    Arrays are float32 ``[H, W]``, top row first; ``[N]`` where the tokens form no grid. They are NaN where a token
    isn't finite.
    """

    #: ``|V' - V|``.
    norm: Array
    #: ``|V' - V| / |V|``; 0 where both are 0.
    relative: Array
    #: Cosine of the angle between V and V'; 1 where both are 0.
    cosine: Array
    #: ``|V'| / |V|``: above 1 where the adapter amplifies a token, below where it suppresses it. For ``modulation``
    #: this shows what it keeps: a token that it all but erases has moved the farthest.
    gain: Array
    #: ``"image"`` or ``"video"``.
    modality: str
    #: Row of the batch, or packed sample.
    row: int
    #: Number of the image or video among those of its modality in the call.
    medium: int
    #: Number of the tile in its image, or of the frame in its video. Families that treat each tile as an image of its
    #: own (InternVL, Idefics3, SmolVLM) count tiles as media.
    index: int
    #: ``(top, left, bottom, right)`` of the entry as shares of its image's height and width, as the processor resized
    #: or cropped it; a tile may extend beyond the edge, where the image is padded. None if the call doesn't tell.
    box: Box | None


@dataclass(frozen=True, eq=False)
class Comparison:
    """One image, tile or frame under two instructions."""

    first: TokenMap
    second: TokenMap
    #: ``|V'_1 - V'_2| / |V|``, float32, shaped as the maps.
    difference: Array


def token_movement(model: Model, inputs: Mapping[str, Any], instruction: Instruction | None = None) -> list[TokenMap]:
    """Measure how far the adapter moves each visual token of a call.

    Args:
        model: a patched model, or its :class:`~emma_adapter.EmmaAdapter`.
        inputs: what the model's processor returned; any number of rows, images, tiles and videos.
        instruction: as the call's own ``instruction=``; default: that of the prompt.

    Returns:
        One map for each image, tile and frame, in the order of the call. Qwen's blocks and windows are put back in
        raster order.

    Raises:
        PatchError: if the model is not patched.
        AnalysisError: if the call has no image, or the adapter is disabled.
    """
    return [_token_map(entry) for entry in observe(model, inputs, instruction)]


def compare(model: Model, inputs: Mapping[str, Any], first: Instruction, second: Instruction) -> list[Comparison]:
    """Map the visual tokens of a call under two instructions, and measure how far apart these move each token.

    Args:
        model: a patched model, or its handle.
        inputs: what the model's processor returned, with any prompt.
        first: an instruction, as the call's ``instruction=``.
        second: another instruction.

    Raises:
        PatchError: if the model is not patched.
        AnalysisError: if the call has no image, or the adapter is disabled.
    """
    pairs = zip(observe(model, inputs, first), observe(model, inputs, second), strict=True)
    return [Comparison(_token_map(a), _token_map(b), _array(_ratio(b.after - a.after, a.before), a)) for a, b in pairs]


def stitch(maps: Sequence[TokenMap], rows: int, columns: int, field: Field = "relative") -> Array:
    """Join the tiles of an image to one map, for families whose calls don't tell how an image was cut.

    Args:
        maps: of the tiles, row by row, without the thumbnail.
        rows: number of rows of tiles.
        columns: number of columns of tiles.
        field: ``"norm"``, ``"relative"``, ``"cosine"`` or ``"gain"``.

    Returns:
        float32 ``[rows * H, columns * W]``.

    Raises:
        AnalysisError: if there are not ``rows * columns`` maps of one grid.
    """
    tiles = [getattr(token_map, field) for token_map in maps]
    shapes = {tile.shape for tile in tiles}
    if len(tiles) != rows * columns or len(shapes) != 1 or len(next(iter(shapes))) != 2:
        raise AnalysisError(
            f"{rows} x {columns} tiles are needed, all of one grid; got {len(tiles)} of shapes {sorted(shapes)}: leave "
            "out the map of the whole image, which most families put first or last"
        )
    return np.block([[tiles[row * columns + column] for column in range(columns)] for row in range(rows)])


def on_image(maps: Sequence[TokenMap], height: int, width: int, field: Field = "relative") -> Array:
    """Paint the maps of one image where they lie in it, tiles over the map of the whole image.

    Args:
        maps: of one image, all with a ``box``.
        height: of the result, such as the image's in pixels.
        width: likewise.
        field: ``"norm"``, ``"relative"``, ``"cosine"`` or ``"gain"``.

    Returns:
        float32 ``[height, width]``; NaN where no map reaches.

    Raises:
        AnalysisError: if a map has no grid or no box.
    """
    painted = np.full((height, width), np.nan, dtype=np.float32)
    for token_map in sorted(maps, key=lambda token_map: token_map.box != WHOLE_IMAGE):
        values = getattr(token_map, field)
        if token_map.box is None or values.ndim != 2:
            raise AnalysisError(
                "where this map lies in its image isn't known, or its tokens form no grid; stitch(maps, rows, columns) "
                "puts tiles together if you know how the image was cut"
            )
        top, left, bottom, right = token_map.box
        y = ((np.arange(height) + 0.5) / height - top) / (bottom - top) * values.shape[0]
        x = ((np.arange(width) + 0.5) / width - left) / (right - left) * values.shape[1]
        inside_y, inside_x = (y >= 0) & (y < values.shape[0]), (x >= 0) & (x < values.shape[1])
        painted[np.ix_(inside_y, inside_x)] = values[np.ix_(y[inside_y].astype(int), x[inside_x].astype(int))]
    return painted


def _token_map(entry: VisualEntry) -> TokenMap:
    before, after = entry.before, entry.after
    moved = after - before
    # In float64: what tells of tokens that hardly moved is the small difference of the cosine from 1.
    before64, after64 = before.double(), after.double()
    lengths = before64.norm(dim=-1) * after64.norm(dim=-1)
    cosine = torch.where(lengths > 0, (before64 * after64).sum(-1) / lengths, 0.0)
    cosine = torch.where((before == 0).all(-1) & (after == 0).all(-1), 1.0, cosine)
    cosine = torch.where(lengths.isfinite(), cosine, torch.nan)
    return TokenMap(
        norm=_array(moved.norm(dim=-1), entry),
        relative=_array(_ratio(moved, before), entry),
        cosine=_array(cosine, entry),
        gain=_array(_gain(before64, after64), entry),
        modality=entry.modality,
        row=entry.row,
        medium=entry.medium,
        index=entry.index,
        box=entry.box,
    )


def _gain(before: Tensor, after: Tensor) -> Tensor:
    """Return ``|after| / |before|``; 1 where both are 0."""
    length = after.norm(dim=-1)
    return torch.where((before == 0).all(-1) & (length == 0), 1.0, length / before.norm(dim=-1))


def _ratio(moved: Tensor, before: Tensor) -> Tensor:
    """Return ``|moved| / |before|``; 0 where nothing moved."""
    distance = moved.norm(dim=-1)
    return torch.where(distance == 0, 0.0, distance / before.norm(dim=-1))


def _array(values: Tensor, entry: VisualEntry) -> Array:
    return values.float().reshape(entry.shape).numpy()
