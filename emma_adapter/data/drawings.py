"""Rows of prompts and pictures, which a model learns to draw and edit from, or is to draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..errors import DataError, ShapeError
from ..unified.pictures import check_size
from ..unified.prompts import check_placeholders
from .conversations import SHOWN, check_characters, named_images
from .images import shortened
from .tables import Table, open_table

_COLUMNS = ("prompt", "target", *SHOWN)
_EDITED = 'and "image": "PATH" or a list of them where there is something to edit'
_FORM = f'{{"prompt": "…", "target": "PATH"}}, {_EDITED}'
_DRAWN_FORM = f'{{"prompt": "…"}}, {_EDITED}'


class Drawings:
    """Rows of a table, ``{"prompt": …, "image"?: …, "target": …}``, as :meth:`EmmaUnified.collator` takes them.

    Images are named or held as :func:`~.images.open_image` takes them, and ``"image"`` may be a list.

    Args:
        table: the rows.
        learned: whether each row must have a target, as training needs.
    """

    def __init__(self, table: Table, *, learned: bool = True) -> None:
        self._table, self._learned = table, learned

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Return the row with its pictures as PIL images, upright and in RGB; the target is None if it has none.

        Raises:
            DataError: naming the row, if it can't be used.
        """
        prompt, target, references = self._read(number)
        images = [self._table.open_image(number, source) for source in references]
        target_image = None if target is None else self._table.open_image(number, target)
        return {"prompt": prompt, "image": images, "target": target_image}

    def check(
        self, name: str, processor: Any, compression: int, *, resized: bool, mixed: bool, progress: bool = False
    ) -> None:
        """Check every row and every picture.

        Args:
            name: the data's name, for messages.
            processor: the model's.
            compression: the autoencoder's, of which the sides of targets must be multiples unless they are resized.
            resized: whether targets are resized to one size.
            mixed: whether targets that aren't resized may have different sizes.
            progress: show a progress bar.

        Raises:
            DataError: naming the first row that can't be used.
            ShapeError: naming the first row whose target has an unusable size.
        """
        if not len(self):
            raise DataError(f"{name} has no rows: there is nothing to learn from; a row is {_FORM}")
        first: tuple[int, int] | None = None
        with click.progressbar(range(len(self)), label=f"Checking {name}", hidden=not progress) as numbers:
            for number in numbers:
                prompt, target, references = self._read(number)
                try:
                    check_placeholders(processor, prompt)
                except DataError as error:
                    raise DataError(f"{self._table.where(number)}: {error}") from error
                for source in references:
                    self._table.check_image(number, source)
                if resized:
                    self._table.check_image(number, target)
                    continue
                size = self._size(number, target, compression)
                first = first or size
                if size != first and not mixed:
                    raise ShapeError(
                        f"{self._table.where(number)}: the target is {size[0]} x {size[1]} (height x width), and the "
                        f"first one {first[0]} x {first[1]}; a batch has one size: give --size {first[0]}x{first[1]}, "
                        "or a batch size of 1"
                    )

    def _size(self, number: int, target: Any, compression: int) -> tuple[int, int]:
        picture = self._table.open_image(number, target)
        try:
            check_size(picture.height, picture.width, compression)
        except ShapeError as error:
            raise ShapeError(f"{self._table.where(number)}, target: {error}, or give --size to all") from error
        return picture.height, picture.width

    def _read(self, number: int) -> tuple[str, Any, list[Any]]:
        """Return the prompt, target and reference pictures of a row."""
        row, where = self._table.row(number), self._table.where(number)
        if row.get("prompt") is None or (self._learned and row.get("target") is None):
            needed, form = ('"prompt" or "target"', _FORM) if self._learned else ('"prompt"', _DRAWN_FORM)
            raise DataError(f"{where} lacks {needed}, and has {sorted(map(str, row))}; a row is {form}")
        prompt = row["prompt"]
        if not isinstance(prompt, str) or not prompt.strip():
            raise DataError(f"{where}: the prompt is {shortened(prompt)}; it must be a text that says what to draw")
        check_characters(prompt, where)
        return prompt, row.get("target"), named_images(row, where)


def open_drawings(source: str, split: str, image_folder: Path | None, *, learned: bool = True) -> Drawings:
    """Return the rows of a table that :func:`~.tables.open_table` opens; targets may be missing unless ``learned``.

    Raises:
        DataError: if there is nothing of this kind.
    """
    return Drawings(open_table(source, split, image_folder, _COLUMNS), learned=learned)
