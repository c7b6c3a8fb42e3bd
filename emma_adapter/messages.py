"""Warnings that name the user's line."""

from __future__ import annotations

import sys
import warnings

_PACKAGE = __name__.partition(".")[0]


def warn_caller(message: str, *through: str) -> None:
    """Warn at the line that led here, outside of this library and of the packages ``through``, however many of their
    functions lie between."""
    # Decorators that are context managers put a line of contextlib between.
    level, frame, passed = 2, sys._getframe(1), {_PACKAGE, "contextlib", *through}
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in passed:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
