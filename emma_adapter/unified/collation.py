"""UnifiedCollator: from rows ``{"prompt", "image"?, "target"}`` to inputs of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError, ShapeError
from ..messages import plain, shown
from .calls import SOURCE, TARGET, WITHOUT_TEXT
from .pictures import check_size, rgb, target_tensors
from .prompts import check_prompts, encode_prompts
from .state import UnifiedState


class UnifiedCollator:
    """Makes batches for ``model(**batch)``, and for Trainer with ``remove_unused_columns=False``.

    A row is ``{"prompt": text, "target": picture}``, with ``"image"`` for editing: a reference picture, or a list of
    them. Pictures are PIL images or paths.

    Args:
        state: of the model.
        size: (height, width) that targets are resized to; None: all of a batch have one size already.
        folder: where relative paths start.
        dropout: whether a call that records gradients may drop ``config.prompt_dropout`` of the prompts.
    """

    def __init__(
        self, state: UnifiedState, size: tuple[int, int] | None, folder: str | Path, *, dropout: bool = True
    ) -> None:
        if size is not None:
            check_size(*size, state.coder.compression)
        self._processor, self._compression = state.processor, state.coder.compression
        self._size, self._folder, self._dropout = size, Path(folder), dropout

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the processor's inputs and ``target_pixel_values`` ``[B, 3, H, W]`` in [0, 1].

        If there are reference pictures, ``source_pixel_values`` has the first one of each row at that size, or the
        target where a row has none. For dropout, ``without_text_…`` are ids and masks of the same rows with empty
        prompts.

        Raises:
            DataError: if a row lacks a field, or has one that can't be used.
            ShapeError: if targets have several sizes.
        """
        for row in rows:
            if "prompt" not in row or "target" not in row:
                raise DataError(f'a row must have "prompt" and "target", and has {shown(sorted(row))}')
        texts = check_prompts([row["prompt"] for row in rows])
        targets = [self._picture(row["target"]) for row in rows]
        references = [self._references(row.get("image")) for row in rows]
        pixels = self._pixels(targets)
        sources = [pictures[0].resize(pixels.shape[:1:-1]) if pictures else None for pictures in references]
        batch = encode_prompts(self._processor, texts, references)
        if self._dropout:
            without = encode_prompts(self._processor, [""] * len(texts), references)
            batch |= {
                f"{WITHOUT_TEXT}{name}": value
                for name, value in without.items()
                if value.shape == without["input_ids"].shape
            }
        batch[TARGET] = pixels
        if any(sources):
            source_pixels = [
                target if source is None else target_tensors(source, 1)[0]
                for target, source in zip(pixels, sources, strict=True)
            ]
            batch[SOURCE] = torch.stack(source_pixels)
        return batch

    def _pixels(self, targets: list[Any]) -> Tensor:
        if self._size is not None:
            targets = [picture.resize(self._size[::-1]) for picture in targets]
        tensors = target_tensors(targets, self._compression)
        if len(sizes := {tuple(tensor.shape[1:]) for tensor in tensors}) > 1:
            raise ShapeError(
                f"the targets of a batch have the sizes {sorted(sizes)}: give the collator a size, or sort"
            )
        return torch.stack(tensors)

    def _references(self, pictures: Any) -> list[Any]:
        if pictures is None:
            return []
        return [self._picture(each) for each in (pictures if isinstance(pictures, (list, tuple)) else [pictures])]

    def _picture(self, source: Any) -> Any:
        if not isinstance(source, (str, Path)):
            return rgb(source)
        from PIL import Image

        path = self._folder / source
        try:
            with Image.open(path) as picture:
                return rgb(picture)
        except OSError as error:
            raise DataError(
                f"the picture {str(path)!r} can't be read ({type(error).__name__}: {plain(str(error), 200)}): paths "
                "start at the collator's folder"
            ) from error
