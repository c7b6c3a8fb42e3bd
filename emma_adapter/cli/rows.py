"""Where conversations with images come from: a JSON file, or a dataset of ``datasets``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from ..errors import DataError
from .conversations import Message, read_messages

#: What the rows of a folder of images are read from.
_IN_A_FOLDER = ("questions.jsonl", "questions.json")
#: Columns that hold what is said, and what it is about.
_TALK = ("messages", "conversations", "question")
_LABELS = ("answer", "attribute", "pair")


class Rows(Protocol):
    """Rows that are read when they are wanted."""

    def __len__(self) -> int: ...

    def messages(self, number: int, *, answered: bool = True) -> list[Message]:
        """Raises:
        DataError: naming the row and what is wrong with it, as that it has no answer unless ``answered`` is False.
        """
        ...

    def label(self, number: int, name: str) -> str | None:
        """What a row says in a column of its own; None if it says nothing.

        Raises:
            DataError: if it is no text or number.
        """
        ...

    def images(self, number: int) -> list[Any]:
        """The images of a row, as PIL images in RGB."""
        ...


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


class FileRows:
    """A row a line (``.jsonl``), or one list of rows (``.json``, as LLaVA's data); images are files beside it."""

    def __init__(self, path: Path, image_folder: Path | None) -> None:
        self.folder = path.parent if image_folder is None else image_folder
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

    def messages(self, number: int, *, answered: bool = True) -> list[Message]:
        where, row = self._row(number)
        return read_messages(row, len(self._paths(row, where)), where, answered=answered)

    def label(self, number: int, name: str) -> str | None:
        where, row = self._row(number)
        return _label(row.get(name), name, where)

    def images(self, number: int) -> list[Any]:
        where, row = self._row(number)
        return [_open(path) for path in self._paths(row, where)]

    def _row(self, number: int) -> tuple[str, Mapping[str, Any]]:
        where, text = self._rows[number]
        row = _parse(text, where)
        if not isinstance(row, Mapping):
            raise DataError(f"{where} is a {type(row).__name__} and should be a JSON object")
        return where, row

    def _paths(self, row: Mapping[str, Any], where: str) -> list[Path]:
        named = row.get("images", row.get("image"))
        names = named if isinstance(named, list) else [] if named is None else [named]
        for name in names:
            if not isinstance(name, str):
                raise DataError(f'{where}: "images" must be a list of file names')
            if not (self.folder / name).is_file():
                raise DataError(f"{where}: there is no image {self.folder / name}; give its folder with --images")
        return [self.folder / name for name in names]


class DatasetRows:
    """A dataset with a column ``messages``, ``conversations`` or ``question``, and one ``images`` or ``image``."""

    def __init__(self, source: str, split: str, image_folder: Path) -> None:
        self.folder = image_folder
        self.source = source
        dataset = _load_dataset(source, split)
        columns = dataset.column_names
        talk = next((name for name in _TALK if name in columns), None)
        self._column = next((name for name in ("images", "image") if name in columns), "")
        if talk is None or not self._column:
            raise DataError(
                f'{source} has the columns {columns}; needed are "messages", "conversations" or "question", and '
                '"images" or "image"'
            )
        # Apart, so that reading the words decodes no image.
        self._talk = dataset.select_columns([talk, *(name for name in _LABELS if name in columns)])
        self._media = dataset.select_columns([self._column])
        self._num_images = _count_images(self._media, self._column)

    def __len__(self) -> int:
        return len(self._num_images)

    def messages(self, number: int, *, answered: bool = True) -> list[Message]:
        return read_messages(self._talk[number], self._num_images[number], self._where(number), answered=answered)

    def label(self, number: int, name: str) -> str | None:
        return _label(self._talk[number].get(name), name, self._where(number))

    def _where(self, number: int) -> str:
        return f"{self.source}, row {number + 1}"

    def images(self, number: int) -> list[Any]:
        found = self._media[number][self._column]
        found = found if isinstance(found, list) else [found]
        return [_open(self.folder / image) if isinstance(image, str) else image.convert("RGB") for image in found]


def _label(value: Any, name: str, where: str) -> str | None:
    if value is not None and (not isinstance(value, (str, int, float)) or isinstance(value, bool)):
        raise DataError(f'{where}: "{name}" is a {type(value).__name__}; it must be a text or a number')
    return None if value is None else str(value)


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not valid JSON: {error}") from error


def _open(path: Path) -> Any:
    from PIL import Image

    with Image.open(path) as image:
        return image.convert("RGB")


def _load_dataset(source: str, split: str) -> Any:
    import datasets

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


def _count_images(media: Any, column: str) -> list[int]:
    """How many images each row has, without decoding any."""
    import pyarrow
    import pyarrow.compute

    counts: list[int] = []
    for batch in media.with_format("arrow").iter(1000):
        values = batch[column]
        is_list = pyarrow.types.is_list(values.type) or pyarrow.types.is_large_list(values.type)
        lengths = pyarrow.compute.list_value_length(values) if is_list else values.is_valid()
        counts += [int(length or 0) for length in lengths.to_pylist()]
    return counts
