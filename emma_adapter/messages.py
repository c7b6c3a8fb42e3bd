"""Messages to people: how values are quoted, and warnings that name the user's line."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable

_MAX_SHOWN = 200
_MAX_NAMED = 5
_PACKAGE = __name__.partition(".")[0]


def warn_caller(message: str, *through: str) -> None:
    """Warn at the innermost line that led here outside of this library and of the packages ``through``."""
    # A context manager that decorates a function adds a frame of contextlib.
    level, frame, skipped = 2, sys._getframe(1), {_PACKAGE, "contextlib", *through}
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in skipped:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def shown(value: object) -> str:
    """Return ``repr(value)`` for a message, cut if it is long."""
    try:
        return _cut(repr(value), _MAX_SHOWN)
    except (ValueError, RecursionError):  # an integer of thousands of digits; a value that holds itself
        return f"a {type(value).__name__} that is too large to show"


def listed(names: Iterable[object]) -> str:
    """Return the first few names for a message, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return f"[{', '.join(map(shown, names[:_MAX_NAMED]))}]{more}"


def plain(text: str, longest: int = 600) -> str:
    """Return a text for a message or a terminal: on one line, control characters escaped, cut if it is long."""
    text = _cut(" ".join(text.split()), longest)
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[:longest]}… ({len(text):,} characters)"
