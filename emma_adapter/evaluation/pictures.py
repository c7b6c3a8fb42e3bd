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
    """Return the seed of a picture: the same whatever else is drawn, and how often it was interrupted."""
    import numpy as np

    return int(np.random.SeedSequence([seed, row, picture]).generate_state(1)[0])


def begin(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write how a folder's pictures are drawn, or check that those in it are drawn the same way.

    Raises:
        ConfigError: if they aren't.
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
    """Draw the pictures that aren't there yet, and return how many were drawn.

    Args:
        unified: a model that draws, :class:`~emma_adapter.EmmaUnified`.
        tasks: the rows.
        folder: of the pictures.
        images: what the names of images are relative to.
        count: pictures of each row.
        seed: of all of them; see :func:`seed_of`.
        settings: of ``generate_images``.

    Raises:
        DataError: if pictures of another row are where this row's go.
    """
    import torch

    drawn = 0
    for task in tasks:
        own = folder / f"{task.number:05}"
        row = (json.dumps(dict(task.row)) + "\n").encode()
        if (own / "metadata.jsonl").exists() and (own / "metadata.jsonl").read_bytes() != row:
            raise DataError(f"{own} holds pictures of another row than {task.where}: give another folder")
        replace_files(own, {"metadata.jsonl": row})
        names = {number: f"{number:05}.png" for number in range(count)}
        missing = [number for number, name in names.items() if not (own / "samples" / name).exists()]
        sources = [open_image(name, images, task.where) for name in task.images]
        # One at a time: a picture's bits don't depend on which others were missing.
        for number in missing:
            own_seed = seed_of(seed, task.number, number)
            # Only edits have images that could guide.
            guided = settings if sources else {**settings, "image_guidance_scale": 1.0}
            picture = unified.generate_images(
                task.prompt, [sources] if sources else None, generator=torch.Generator().manual_seed(own_seed), **guided
            ).images[0]
            stored = io.BytesIO()
            picture.save(stored, "png")
            replace_files(own / "samples", {names[number]: stored.getvalue()})
            drawn += 1
    return drawn


def pictures_of(task: Task, folder: Path) -> list[Path]:
    """Return the pictures of a row, in order.

    Raises:
        DataError: if there is none.
    """
    found = listed_pictures(folder / f"{task.number:05}" / "samples")
    if not found:
        raise DataError(
            f"{task.where} has no picture in {folder / f'{task.number:05}' / 'samples'}: draw them first (--model and "
            "--adapter), or put those made elsewhere there"
        )
    return found


def listed_pictures(folder: Path) -> list[Path]:
    """Return the pictures of a folder and of those in it, by name."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file())


def opened(paths: Sequence[Path]) -> list[Any]:
    """Return pictures, upright and in RGB."""
    return [open_image(str(path.resolve()), Path(), str(path)) for path in paths]
