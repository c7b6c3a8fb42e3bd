"""Tables of a user's data: a JSON file, or a dataset of ``datasets``, with rows that name or hold images."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ..errors import DataError
from .images import check_image, local_file, open_image


class Table(ABC):
    """Rows that are read on demand.

    Args:
        folder: that the names of images are relative to.
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
    def row(self, number: int) -> Mapping[str, Any]:
        """Return what the row holds."""

    def open_image(self, number: int, source: Any) -> Any:
        """Return an image that a row names or holds, as a PIL image, upright and in RGB.

        Raises:
            DataError: naming the row and the image, if it can't be opened.
        """
        return open_image(source, self.folder, self.where(number))

    def check_image(self, number: int, source: Any) -> None:
        """Check that an image of a row can be opened and is complete; each file is checked once.

        Raises:
            DataError: as :meth:`open_image`.
        """
        file = local_file(source, self.folder)
        if file is None or file not in self._whole:
            check_image(source, self.folder, self.where(number))
        if file is not None:
            self._whole.add(file)


def open_table(source: str, split: str, image_folder: Path | None, columns: Collection[str]) -> Table:
    """Return the rows of a JSON file or a dataset.

    Args:
        source: a ``.jsonl`` or ``.json`` file, a folder that ``Dataset.save_to_disk`` wrote, or a dataset on the hub.
        split: of a dataset.
        image_folder: that the names of images are relative to; default: the file's folder.
        columns: of a dataset; others are not read.

    Raises:
        DataError: if there is nothing of this kind.
    """
    if source.endswith((".jsonl", ".json")) or Path(source).is_file():
        return FileTable(Path(source), image_folder)
    return DatasetTable(source, split, image_folder or Path(), columns)


class FileTable(Table):
    """A file with a row on each line (``.jsonl``) or one list of rows (``.json``, as LLaVA's); images are files."""

    def __init__(self, path: Path, image_folder: Path | None) -> None:
        super().__init__(path.parent if image_folder is None else image_folder)
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8: {error}") from error
        # Kept as text, which takes a small part of the memory that the objects would.
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

    def row(self, number: int) -> Mapping[str, Any]:
        where, text = self._rows[number]
        row = _parse(text, where)
        if not isinstance(row, Mapping):
            raise DataError(f"{where} is a {type(row).__name__} and should be a JSON object")
        return row


class DatasetTable(Table):
    """A dataset whose images are names of files, or of the feature ``Image``."""

    def __init__(self, source: str, split: str, image_folder: Path, columns: Collection[str]) -> None:
        super().__init__(image_folder)
        self.source = source
        #: By column, as in ``datasets``.
        self.features: dict[str, Any] = (dataset := _load_dataset(source, split)).features
        stored = dataset.select_columns([name for name in dataset.column_names if name in columns])
        # Read as it is stored, so that images are recognized in one place only; mixed content is stored as JSON.
        self._stored = stored.with_format("arrow")
        mixed = [name for name in stored.column_names if "Json(" in str(stored.features[name])]
        self._mixed = stored.select_columns(mixed) if mixed else None

    def __len__(self) -> int:
        return len(self._stored)

    def where(self, number: int) -> str:
        return f"{self.source}, row {number + 1}"

    def row(self, number: int) -> Mapping[str, Any]:
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
