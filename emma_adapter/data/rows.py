"""Rows of conversations with images, in any form that :mod:`.conversations` reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import DataError
from .conversations import MEDIA, SAID, SHOWN, TALK, Conversation, Message, read_conversation
from .tables import DatasetTable, Table, open_table

#: Files that hold the rows of a folder of images.
_IN_A_FOLDER = ("questions.jsonl", "questions.json")
#: Columns that say what a row is about.
_LABELS = ("attribute", "pair")


class Rows:
    """The conversations of a table, read on demand."""

    def __init__(self, table: Table) -> None:
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    def where(self, number: int) -> str:
        """Return the row's place, for messages."""
        return self._table.where(number)

    def messages(self, number: int, *, answered: bool = True) -> list[Message]:
        """Return the messages of a row, with a part ``{"type": "image"}`` for each image.

        Raises:
            DataError: naming the row and what is wrong with it, such as a missing answer if ``answered``.
        """
        return self._conversation(number, answered).messages

    def label(self, number: int, name: str) -> str | None:
        """Return the text in a row's column called ``name``; None if there is none.

        Raises:
            DataError: if it is neither a text nor a number.
        """
        value = self._table.row(number).get(name)
        if value is not None and (not isinstance(value, (str, int, float)) or isinstance(value, bool)):
            raise DataError(
                f'{self.where(number)}: "{name}" is a {type(value).__name__}; it must be a text or a number'
            )
        return None if value is None else str(value)

    def images(self, number: int) -> list[Any]:
        """Return the images of a row in the order in which they are shown, as PIL images, upright and in RGB.

        Raises:
            DataError: naming the row and the image that can't be opened.
        """
        conversation = self._conversation(number, answered=False)
        return [self._table.open_image(number, source) for source in conversation.images]

    def check(self, number: int, *, answered: bool = True) -> list[Message]:
        """Check a row and its images, each file once, and return its messages.

        Raises:
            DataError: as :meth:`messages` and :meth:`images`.
        """
        conversation = self._conversation(number, answered)
        for source in conversation.images:
            self._table.check_image(number, source)
        return conversation.messages

    def _conversation(self, number: int, answered: bool) -> Conversation:
        return read_conversation(self._table.row(number), self.where(number), answered=answered)


def open_rows(source: str, split: str, image_folder: Path | None) -> Rows:
    """Return the rows of a table that :func:`~.tables.open_table` opens, or of a folder with a file of questions.

    Raises:
        DataError: if there is nothing of this kind, or a dataset lacks the columns.
    """
    file = next((str(path) for name in _IN_A_FOLDER if (path := Path(source) / name).is_file()), source)
    table = open_table(file, split, image_folder, (*SAID, *MEDIA, *_LABELS))
    if isinstance(table, DatasetTable):
        _check_columns(table)
    return Rows(table)


def _check_columns(table: DatasetTable) -> None:
    columns = list(table.features)
    talk = [name for name in TALK if name in columns]
    if not talk or (not any(name in columns for name in SHOWN) and not _names_images(table.features, talk)):
        raise DataError(
            f'{table.source} has the columns {columns}; needed are "messages", "conversations" or "question", and '
            '"images" or "image", unless the parts of the messages name them'
        )


def _names_images(features: Any, talk: list[str]) -> bool:
    """Return whether the messages may name or hold images themselves."""
    stored = " ".join(str(features[name]) for name in talk)
    return any(word in stored for word in ("image", "url", "path", "base64", "Json"))
