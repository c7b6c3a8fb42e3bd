"""UnifiedCollator: rows ``{"prompt", "image"?, "target"}`` as inputs of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError, ShapeError
from ..untrusted import plain, shown
from .calls import SOURCE, TARGET, WITHOUT_TEXT
from .pictures import check_size, rgb, target_tensors
from .prompts import check_prompts, encode_prompts
from .state import UnifiedState


class UnifiedCollator:
    """Makes batches for ``model(**batch)``, and for Trainer with ``remove_unused_columns=False``.

    A row is ``{"prompt": text, "target": picture}``, and to edit also ``"image"``: a reference picture, or a list of
    them. Pictures are PIL images or paths.

    Args:
        state: of the model.
        size: (height, width) that targets are resized to; None: all of a batch have one size already.
        folder: that paths start at.
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
        """Return the processor's inputs, ``target_pixel_values`` ``[B, 3, H, W]`` in [0, 1], and, if there are
        reference pictures, ``source_pixel_values``: the first one of each row at that size, the target where there is
        none.

        For dropout, the ids and masks of the same rows with empty prompts go with them, as ``without_text_…``.

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
        sources = [own[0].resize(pixels.shape[:1:-1]) if own else None for own in references]
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
            before = [pixels[n] if one is None else target_tensors(one, 1)[0] for n, one in enumerate(sources)]
            batch[SOURCE] = torch.stack(before)
        return batch

    def _pixels(self, targets: list[Any]) -> Tensor:
        if self._size is not None:
            targets = [picture.resize(self._size[::-1]) for picture in targets]
        tensors = target_tensors(targets, self._compression)
        if len(sizes := {tuple(one.shape[1:]) for one in tensors}) > 1:
            raise ShapeError(
                f"the targets of a batch have the sizes {sorted(sizes)}: give the collator a size, or sort"
            )
        return torch.stack(tensors)

    def _references(self, given: Any) -> list[Any]:
        if given is None:
            return []
        return [self._picture(one) for one in (given if isinstance(given, (list, tuple)) else [given])]

    def _picture(self, given: Any) -> Any:
        if not isinstance(given, (str, Path)):
            return rgb(given)
        from PIL import Image

        path = self._folder / given
        try:
            with Image.open(path) as picture:
                return rgb(picture)
        except OSError as error:
            raise DataError(
                f"the picture {str(path)!r} can't be read ({type(error).__name__}: {plain(str(error), 200)}): paths "
                "start at the collator's folder"
            ) from error
