"""The figures of :mod:`emma_adapter.analysis.plots` as parts of one page."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_ROWS, _COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")


class Figures:
    """Draws figures that can stand in one page.

    No two of one ``Figures`` share an id, and their lines and words have the colour of the text around them.
    """

    def __init__(self) -> None:
        self._count = 0

    def inline(self, draw: Callable[[], Figure], description: str) -> str:
        """Draw a figure as an ``<svg>`` element.

        Args:
            draw: makes the figure.
            description: the alternative text.
        """
        from ..analysis import plots

        with _defaults():
            root = ElementTree.fromstring(plots.svg(draw()))
        self._count += 1
        prefix = f"figure-{self._count}-"
        parents = [(parent, child) for parent in root.iter() for child in parent]
        for parent, child in parents:
            # Style rules would apply to the whole page, which has its own. Metadata name matplotlib's site.
            if child.tag in (f"{{{_SVG}}}style", f"{{{_SVG}}}metadata"):
                parent.remove(child)
        for element in root.iter():
            for name, value in element.attrib.items():
                element.set(name, _prefixed(name, value, prefix).replace(plots.GREY, "currentColor"))
        root.set("role", "img")
        root.set("aria-label", description)
        # HTML doesn't know the prefixes that ElementTree would invent.
        ElementTree.register_namespace("", _SVG)
        ElementTree.register_namespace("xlink", _XLINK)
        return ElementTree.tostring(root, encoding="unicode")


def place_of(values: ArrayLike) -> str:
    """Say in words where the values of a map are highest."""
    array = np.asarray(values, dtype=np.float64)
    finite = array[np.isfinite(array)]
    if not len(finite):
        return "not finite anywhere"
    low, high = float(finite.min()), float(finite.max())
    # Values are shares of a token's length, so that smaller differences are rounding. Ends that are printed alike tell
    # nothing either.
    if high - low <= 1e-6 * max(abs(high), 1) or f"{low:.3g}" == f"{high:.3g}":
        return f"the same everywhere, {high:.3g}"
    if array.ndim != 2:
        return f"from {low:.3g} to {high:.3g}"
    row, column = np.unravel_index(int(np.nanargmax(np.where(np.isfinite(array), array, np.nan))), array.shape)
    return (
        f"from {low:.3g} to {high:.3g}, highest at the {_third(int(row), array.shape[0], _ROWS)} "
        f"{_third(int(column), array.shape[1], _COLUMNS)}"
    ).replace("middle centre", "centre")


def common_limits(maps: list[NDArray[np.float32]]) -> tuple[float, float] | None:
    """Return limits for the colours of several maps, or None if no value is finite.

    They leave out the outermost hundredths, which would give all others one colour.
    """
    values = np.concatenate([array.ravel() for array in maps]) if maps else np.empty(0, np.float32)
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    low, high = (float(limit) for limit in np.percentile(values, (1, 99)))
    return (low, high) if high > low else (low, low + 1e-6)


def _third(place: int, length: int, names: tuple[str, ...]) -> str:
    if length == 1:
        return names[1]
    # By the middle of the cell, so that the first of two rows is at the top.
    return names[min(2, int(3 * (place + 0.5) / length))]


def _prefixed(name: str, value: str, prefix: str) -> str:
    if name == "id":
        return prefix + value
    if name.endswith("href") and value.startswith("#"):
        return f"#{prefix}{value[1:]}"
    return _REFERENCE.sub(rf"url(#{prefix}\1)", value)


@contextmanager
def _defaults() -> Iterator[None]:
    """Use matplotlib's default settings in the block instead of the user's, and the same ids each time."""
    import matplotlib as mpl

    with mpl.rc_context():
        # A figure that is only saved needs no backend, and setting one would load it.
        mpl.rcParams.update({k: v for k, v in mpl.rcParamsDefault.items() if not k.startswith("backend")})
        mpl.rcParams["svg.hashsalt"] = "emma_adapter"
        yield
