"""Where conversations with images come from: a JSON file, or a dataset of ``datasets``."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import DataError
from .conversations import MEDIA, SAID, SHOWN, TALK, Conversation, Message, read_conversation
from .images import check_image, local_file, open_image

#: What the rows of a folder of images are read from.
_IN_A_FOLDER = ("questions.jsonl", "questions.json")
#: Columns that say what a row is about.
_LABELS = ("attribute", "pair")


class Rows(ABC):
    """Rows that are read when they are wanted.

    Args:
        folder: what the names of images are relative to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._whole: set[Path] = set()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def where(self, number: int) -> str:
        """Return the row's place, for messages."""

    @abstractmethod
    def _row(self, number: int) -> Mapping[str, Any]:
        """What the row holds."""

    def messages(self, number: int, *, answered: bool = True) -> list[Message]:
        """Return what is said in a row, with a part ``{"type": "image"}`` for each image.

        Raises:
            DataError: naming the row and what is wrong with it, as that it has no answer unless ``answered`` is False.
        """
        return self._conversation(number, answered).messages

    def label(self, number: int, name: str) -> str | None:
        """Return what a row says in a column of its own; None if it says nothing.

        Raises:
            DataError: if it is no text or number.
        """
        value = self._row(number).get(name)
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
        where = self.where(number)
        return [open_image(source, self.folder, where) for source in self._conversation(number, answered=False).images]

    def check(self, number: int, *, answered: bool = True) -> list[Message]:
        """Check a row and its images, each file once, and return what is said in it.

        Raises:
            DataError: as :meth:`messages` and :meth:`images`.
        """
        conversation = self._conversation(number, answered)
        for source in conversation.images:
            file = local_file(source, self.folder)
            if file is None or file not in self._whole:
                check_image(source, self.folder, self.where(number))
            if file is not None:
                self._whole.add(file)
        return conversation.messages

    def _conversation(self, number: int, answered: bool) -> Conversation:
        return read_conversation(self._row(number), self.where(number), answered=answered)


def open_rows(source: str, split: str, image_folder: Path | None) -> Rows:
    """The rows of a ``.jsonl`` or ``.json`` file, of a folder that holds one called ``questions``, of a folder that
    ``Dataset.save_to_disk`` wrote, or of a dataset on the hub.

    Raises:
        DataError: if there is nothing of this kind.
    """
    if source.endswith((".jsonl", ".json")) or Path(source).is_file():
        return FileRows(Path(source), image_folder)
    for name in _IN_A_FOLDER:
        if (Path(source) / name).is_file():
            return FileRows(Path(source) / name, image_folder)
    return DatasetRows(source, split, image_folder or Path())


class FileRows(Rows):
    """A row a line (``.jsonl``), or one list of rows (``.json``, as LLaVA's data); images are files beside it."""

    def __init__(self, path: Path, image_folder: Path | None) -> None:
        super().__init__(path.parent if image_folder is None else image_folder)
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8: {error}") from error
        # Kept as text, which is a small part of what it takes as objects.
        self._rows: list[tuple[str, str]]
        if path.suffix == ".json":
            rows = _parse(text, str(path))
            if not isinstance(rows, list):
                raise DataError(f"{path} must hold a list of rows; one row a line is for files called .jsonl")
            self._rows = [(f"{path}, row {number}", json.dumps(row)) for number, row in enumerate(rows, 1)]
        else:
            lines = enumerate(text.split("\n"), 1)
            self._rows = [(f"{path}, line {number}", line) for number, line in lines if line.strip()]

    def __len__(self) -> int:
        return len(self._rows)

    def where(self, number: int) -> str:
        return self._rows[number][0]

    def _row(self, number: int) -> Mapping[str, Any]:
        where, text = self._rows[number]
        row = _parse(text, where)
        if not isinstance(row, Mapping):
            raise DataError(f"{where} is a {type(row).__name__} and should be a JSON object")
        return row


class DatasetRows(Rows):
    """A dataset with the columns of a row. Its images are files by name, or of the feature ``Image``."""

    def __init__(self, source: str, split: str, image_folder: Path) -> None:
        super().__init__(image_folder)
        self.source = source
        dataset = _load_dataset(source, split)
        columns = dataset.column_names
        talk = [name for name in TALK if name in columns]
        if not talk or (not any(name in columns for name in SHOWN) and not _names_images(dataset.features, talk)):
            raise DataError(
                f'{source} has the columns {columns}; needed are "messages", "conversations" or "question", and '
                '"images" or "image", unless the parts of the messages name them'
            )
        stored = dataset.select_columns([name for name in columns if name in (*SAID, *MEDIA, *_LABELS)])
        # As it is stored, so that what an image is, is decided in one place; mixed content is stored as JSON.
        self._stored = stored.with_format("arrow")
        mixed = [name for name in stored.column_names if "Json(" in str(stored.features[name])]
        self._mixed = stored.select_columns(mixed) if mixed else None

    def __len__(self) -> int:
        return len(self._stored)

    def where(self, number: int) -> str:
        return f"{self.source}, row {number + 1}"

    def _row(self, number: int) -> Mapping[str, Any]:
        mixed = {} if self._mixed is None else self._mixed[number]
        return {**self._stored[number].to_pylist()[0], **mixed}


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not valid JSON: {error}") from error


def _load_dataset(source: str, split: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f'{source} is no .jsonl file; for datasets: pip install "emma_adapter[train]" ({error})'
        ) from error
    try:
        if any((Path(source) / name).is_file() for name in ("state.json", "dataset_dict.json")):
            loaded = datasets.load_from_disk(source)
            return loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        return datasets.load_dataset(source, split=split)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{source} can't be loaded with split {split!r}: give a .jsonl file, a folder that Dataset.save_to_disk "
            f"wrote, or a dataset on the hub, and --split ({error})"
        ) from error


def _names_images(features: Any, talk: list[str]) -> bool:
    """Whether the messages may name images themselves, or hold them."""
    stored = " ".join(str(features[name]) for name in talk)
    return any(word in stored for word in ("image", "url", "path", "base64", "Json"))
