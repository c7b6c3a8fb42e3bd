"""The folder of pictures, laid out as GenEval's: ``00000/metadata.jsonl`` and ``00000/samples/00000.png`` of row 0."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.images import open_image
from ..errors import ConfigError, DataError
from ..files.atomic import replace_files
from .tasks import Task

_SETTINGS = "drawing.json"
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def seed_of(seed: int, row: int, picture: int) -> int:
    """Return the seed of a picture, which doesn't depend on what else is drawn, nor on interruptions."""
    import numpy as np

    return int(np.random.SeedSequence([seed, row, picture]).generate_state(1)[0])


def begin(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings of a folder's pictures, or check that those in it were drawn with the same settings.

    Raises:
        ConfigError: if they were drawn with others.
    """
    text = json.dumps(dict(settings), indent=1, sort_keys=True) + "\n"
    file = folder / _SETTINGS
    if file.exists():
        if file.read_text(encoding="utf-8") != text:
            raise ConfigError(
                f"{folder} holds pictures that were drawn with other settings ({file.name} has them): give another "
                "folder, or the same settings to go on"
            )
    else:
        replace_files(folder, {file.name: text.encode()})


def draw_missing(
    unified: Any, tasks: Iterable[Task], folder: Path, images: Path, count: int, seed: int, **settings: Any
) -> int:
    """Draw the pictures that don't exist yet, and return how many were drawn.

    Args:
        unified: a model that draws, :class:`~emma_adapter.EmmaUnified`.
        tasks: the rows.
        folder: of the pictures.
        images: the folder that names of images are relative to.
        count: of pictures of each row.
        seed: of all pictures; see :func:`seed_of`.
        settings: of ``generate_images``.

    Raises:
        DataError: if a row's folder holds pictures of another row.
    """
    import torch

    drawn = 0
    for task in tasks:
        row_folder = folder / f"{task.number:05}"
        row = (json.dumps(dict(task.row)) + "\n").encode()
        metadata = row_folder / "metadata.jsonl"
        if metadata.exists() and metadata.read_bytes() != row:
            raise DataError(f"{row_folder} holds pictures of another row than {task.where}: give another folder")
        replace_files(row_folder, {metadata.name: row})
        names = {number: f"{number:05}.png" for number in range(count)}
        missing = [number for number, name in names.items() if not (row_folder / "samples" / name).exists()]
        sources = [open_image(name, images, task.where) for name in task.images]
        # One at a time: a picture's bits don't depend on which others were missing.
        for number in missing:
            generator = torch.Generator().manual_seed(seed_of(seed, task.number, number))
            # Only edits have images to guide them.
            guided = settings if sources else {**settings, "image_guidance_scale": 1.0}
            picture = unified.generate_images(
                task.prompt, [sources] if sources else None, generator=generator, **guided
            ).images[0]
            png = io.BytesIO()
            picture.save(png, "png")
            replace_files(row_folder / "samples", {names[number]: png.getvalue()})
            drawn += 1
    return drawn


def pictures_of(task: Task, folder: Path) -> list[Path]:
    """Return the pictures of a row, in order.

    Raises:
        DataError: if there is none.
    """
    samples = folder / f"{task.number:05}" / "samples"
    pictures = listed_pictures(samples)
    if not pictures:
        raise DataError(
            f"{task.where} has no picture in {samples}: draw them first (--model and "
            "--adapter), or put those made elsewhere there"
        )
    return pictures


def listed_pictures(folder: Path) -> list[Path]:
    """Return the pictures in a folder and its subfolders, by name."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file())


def opened(paths: Sequence[Path]) -> list[Any]:
    """Open pictures, upright and in RGB."""
    return [open_image(str(path.resolve()), Path(), str(path)) for path in paths]
