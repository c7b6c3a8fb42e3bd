"""Where errors are raised, read off the source."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

from emma_adapter import errors

ROOT = Path(__file__).parents[3]
FAMILY = {name for name, value in vars(errors).items() if isinstance(value, type)}


@dataclass(frozen=True)
class Site:
    """One ``raise``."""

    path: str
    """From the repository's root."""
    function: str
    raised: str
    """What is raised, as the source says it."""
    text: str
    """The message as the source has it, with expressions in braces."""
    lines: range

    @property
    def is_ours(self) -> bool:
        """Whether it is of the family; a config's ``_error`` and a file's ``_invalid`` make one."""
        return self.raised in FAMILY or self.raised in ("self._error", "_invalid")


def all_sites() -> list[Site]:
    """Every ``raise`` of a new error in the package and in ``integrations/``, in the order of the source."""
    found: list[Site] = []
    for path in sorted([*(ROOT / "emma_adapter").rglob("*.py"), *(ROOT / "integrations").rglob("*.py")]):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found += _sites_in(tree, path.relative_to(ROOT).as_posix(), "")
    return found


def _said(argument: ast.expr) -> str:
    if isinstance(argument, ast.Constant):
        return str(argument.value)
    if isinstance(argument, ast.JoinedStr):
        return "".join(_said(part) for part in argument.values)
    if isinstance(argument, ast.BinOp):
        return _said(argument.left) + _said(argument.right)
    if isinstance(argument, ast.FormattedValue):
        return f"{{{ast.unparse(argument.value)}}}"
    return f"{{{ast.unparse(argument)}}}"


def _sites_in(node: ast.AST, path: str, function: str) -> list[Site]:
    found: list[Site] = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Raise) and isinstance(child.exc, ast.Call):
            raised = ast.unparse(child.exc.func)
            lines = range(child.lineno, (child.end_lineno or child.lineno) + 1)
            found.append(Site(path, function, raised, " ".join(map(_said, child.exc.args)), lines))
        inside = isinstance(child, (ast.FunctionDef, ast.ClassDef))
        name = f"{function}.{child.name}".lstrip(".") if inside else function  # type: ignore[attr-defined]
        found += _sites_in(child, path, name)
    return found
