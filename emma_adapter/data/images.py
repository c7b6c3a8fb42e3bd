"""Images that data name or hold: found, checked, and opened upright in RGB."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from ..errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

_VIDEOS = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".mpeg", ".mpg", ".m4v", ".wmv", ".flv")
#: A JPEG ends with this; some cameras and programs write a little more after it.
_END_OF_JPEG, _AT_THE_END = b"\xff\xd9", 64
#: Pillow's modes whose pixels are numbers of more than 8 bits.
_NUMBERS = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
#: The name in messages of an image that a row itself holds.
_HELD = "its image"


def to_rgb(image: Image) -> Image:
    """Return a PIL image upright and in RGB, its first frame if it is animated.

    It is turned as its EXIF orientation says, and transparency is dropped, as by ``datasets`` and by transformers'
    ``load_image``. Of 16-bit grey the upper eight bits are taken; Pillow's own conversion would make all but the
    darkest pixels white.

    Raises:
        DataError: if its pixels are floats, or integers of more than 16 bits, whose range nobody knows.
    """
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode in _NUMBERS:
        import numpy as np

        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() >= 2**16:
            raise DataError(
                f"its pixels are numbers from {values.min():g} to {values.max():g} (mode {image.mode!r}), and which is "
                "white can't be known: save it with 8 bits a channel"
            )
        image = Image.fromarray((values >> 8).astype(np.uint8))
    return image.convert("RGB")


def open_image(source: Any, folder: Path, where: str) -> Image:
    """Return an image, upright and in RGB.

    Args:
        source: a file's name, a ``file:`` or ``data:`` URL, the bytes of a file, a mapping with ``bytes`` or ``path``
            as ``datasets`` stores them, or a PIL image.
        folder: what file names are relative to.
        where: the row's place, for messages.

    Raises:
        DataError: naming the row and the image, if the image is missing or can't be read.
    """
    with _opened(source, folder, where) as image:
        return to_rgb(image)


def check_image(source: Any, folder: Path, where: str) -> None:
    """Check that an image can be opened and is complete, without decoding it where that isn't needed.

    Args:
        source: as for :func:`open_image`.
        folder: likewise.
        where: likewise.

    Raises:
        DataError: as :func:`open_image`.
    """
    from PIL import Image

    whole = False
    if not isinstance(source, Image.Image):
        with _opened(source, folder, where) as image:
            whole = _is_whole(image)
    if not whole:
        open_image(source, folder, where)


def local_file(source: Any, folder: Path) -> Path | None:
    """Return the path of the file that a source names; None if it holds the image itself, or is something else."""
    name = source.get("path") if isinstance(source, Mapping) and source.get("bytes") is None else source
    if not isinstance(name, str) or name.startswith("data:"):
        return None
    return Path(unquote(urlsplit(name).path)) if name.startswith("file:") else folder / name


def as_data_url(text: str) -> str:
    """Return base64 text as a ``data:`` URL, and a ``data:`` URL unchanged."""
    return text if text.startswith("data:") else f"data:;base64,{text}"


@contextmanager
def _opened(source: Any, folder: Path, where: str) -> Iterator[Image]:
    from PIL import Image

    if isinstance(source, Image.Image):
        with _explained("its image", where):
            yield source
        return
    file, name = _file(source, folder, where)
    with _explained(name, where), Image.open(file) as image:
        yield image


def _file(source: Any, folder: Path, where: str) -> tuple[Path | IO[bytes], str]:
    """Return what Pillow is to open, and its name in messages."""
    content = source.get("bytes") if isinstance(source, Mapping) else source
    if isinstance(content, str) and content.startswith("data:"):
        content = _decoded(content, where)
    if isinstance(content, bytes):
        return io.BytesIO(content), _HELD
    path = local_file(source, folder)
    if path is None:
        raise DataError(
            f"{where}: an image is {shortened(source)}; images must be file names, or data: URLs that hold one"
        )
    # Unlike Path's methods, these take any text.
    if os.path.isdir(path):
        raise DataError(f"{where}: the image {path} is a folder: name a file in it")
    if not os.path.isfile(path):
        name = str(source.get("path") if isinstance(source, Mapping) else source)
        if "://" in name and not name.startswith("file:"):
            raise DataError(
                f"{where}: the image {shortened(name)} is on the web, from where nothing is downloaded: save it as a "
                "file, and name that"
            )
        # The end of a path is what helps most to find it.
        raise DataError(f"{where}: there is no image {str(path)[-300:]}; give its folder with --images")
    return path, str(path)


def _decoded(url: str, where: str) -> bytes:
    head, _, body = url.partition(",")
    if not head.endswith(";base64"):
        return unquote_to_bytes(body)
    try:
        return base64.b64decode("".join(body.split()), validate=True)
    except ValueError as error:
        raise DataError(f"{where}: an image is not valid base64 ({error}): encode its file once more") from error


def _is_whole(image: Any) -> bool:
    """Return whether a file's own marks show that it is complete; without them it may still be."""
    if image.mode in _NUMBERS:
        return False
    if image.format in ("JPEG", "MPO"):
        image.fp.seek(0, os.SEEK_END)
        image.fp.seek(max(image.fp.tell() - _AT_THE_END, 0))
        return _END_OF_JPEG in image.fp.read()
    if image.format == "PNG":
        try:
            image.verify()
        except Exception:  # noqa: BLE001 - decoding it will tell what is wrong
            return False
        return True
    return False


@contextmanager
def _explained(name: str, where: str) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise DataError(f"{where}: {name} can't be used: {error}") from error
    except Exception as error:  # Pillow's readers raise all kinds of errors on damaged files
        reason, remedy = _explanation(error, name)
        raise DataError(f"{where}: {name} can't be read as an image ({reason}): {remedy}") from error


def _explanation(error: Exception, name: str) -> tuple[str, str]:
    """Return what is wrong, and the remedy."""
    from PIL import Image, UnidentifiedImageError

    reason = (str(error) or type(error).__name__).split("\n", 1)[0]
    if isinstance(error, Image.DecompressionBombError):
        return reason, "make it smaller; how large an image may be is PIL.Image.MAX_IMAGE_PIXELS"
    if isinstance(error, UnidentifiedImageError):
        if name.lower().endswith(_VIDEOS):
            return "it is a video", "name frames of it as images; videos are not read"
        if name != _HELD and os.path.getsize(name) == 0:
            reason = "the file is empty"
        else:
            return "it is in no format that Pillow knows", "save it as PNG or JPEG, or leave the row out"
    return reason, "download or copy it again, or leave the row out"


def shortened(value: Any) -> str:
    """Return a value as messages show it, cut off after 60 characters."""
    text = repr(value) if not isinstance(value, (list, Mapping)) else f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:60]}…"
