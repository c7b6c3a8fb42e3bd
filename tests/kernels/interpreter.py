"""Triton's interpreter, where it doesn't fit the NumPy that is installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def scalars_as_indices() -> Iterator[None]:
    """Triton before 3.7 makes numbers of arrays in a way that NumPy 2.4 no longer takes."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, *scope):
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patched
    try:
        yield
    finally:
        interpreter._patch_lang_tensor = patch
