"""Reads this library's docstrings for the API pages: Sphinx roles become code, and ``#:`` comments docstrings."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":\w+:`~?(?:[\w.]+\.)?(\w+)`")


class Docstrings(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(r"`\1`", obj.docstring.value)

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        if attr.docstring is None and attr.lineno is not None and (comment := _comment_above(attr)):
            attr.docstring = griffe.Docstring(comment, parent=attr, lineno=attr.lineno)


def _comment_above(attribute: griffe.Attribute) -> str:
    lines: list[str] = []
    source = attribute.lines_collection[attribute.filepath]
    for line in reversed(source[: (attribute.lineno or 1) - 1]):
        if not line.lstrip().startswith("#:"):
            break
        lines.insert(0, line.lstrip().removeprefix("#:").strip())
    return _ROLE.sub(r"`\1`", " ".join(lines))
