"""Every example in the documentation runs: a page's blocks one after another, in the folder of ``workspace.py``.

``python`` blocks of a page share their names; ``bash`` blocks run in a shell that stops at the first error, and
in the everyday tier our own command line in this process, which has imported what takes a new one seconds.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from emma_adapter.alignment.fusion import registry
from emma_adapter.cli import main
from emma_adapter.models import registry as family_registry
from tests.support import budget
from tests.support.workspace import llava_package, make_workspace

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
#: One is generated from docstrings, one tells how the library is laid out.
WITHOUT_EXAMPLES = {"api.md", "architecture.md"}
_BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def name_of(page: Path) -> str:
    return page.relative_to(DOCS).as_posix()


def test_every_block_names_its_language():
    for page in PAGES:
        fences = re.findall(r"^```(.*)$", page.read_text(), re.MULTILINE)
        assert all(fences[0::2]), page
        assert not any(fences[1::2]), page


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_page_has_examples(page):
    has_examples = _BLOCK.search(page.read_text()) is not None
    assert has_examples == (name_of(page) not in WITHOUT_EXAMPLES)


def commands_of(code: str) -> list[list[str]] | None:
    """The arguments of each call of our command line; None if there is anything else in the block."""
    lines = [line for line in code.replace("\\\n", " ").splitlines() if line.strip()]
    if any(not line.startswith("emma-adapter ") or set("|<>$&;*`#") & set(line) for line in lines):
        return None
    return [shlex.split(line)[1:] for line in lines]


def run(code: str) -> tuple[int, str]:
    """Run a block of ``bash``: its exit code, and what it said."""
    commands = None if budget.FULL else commands_of(code)
    if commands is None:
        done = subprocess.run(["bash", "-euo", "pipefail", "-c", code], check=False, capture_output=True, text=True)
        return done.returncode, f"{done.stdout}\n{done.stderr}"
    results = [CliRunner().invoke(main, arguments) for arguments in commands]
    return max(result.exit_code for result in results), "\n".join(result.output for result in results)


#: What takes longest, and other tests do each time: several processes, lmms-eval and training on the command line.
NIGHTLY = {"evaluation.md", "distributed.md", "command-line.md"}
WITH_EXAMPLES = [
    pytest.param(page, id=name_of(page), marks=[pytest.mark.nightly] if name_of(page) in NIGHTLY else [])
    for page in PAGES
    if _BLOCK.search(page.read_text())
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", WITH_EXAMPLES)
def test_page(page, tmp_path, monkeypatch):
    text = page.read_text()
    monkeypatch.chdir(make_workspace(tmp_path, text))
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for module, register in ((family_registry, "_FAMILIES"), (registry, "FUSIONS")):  # what a page registers goes again
        monkeypatch.setattr(module, register, dict(getattr(module, register)))
    for name, module in llava_package().items():
        monkeypatch.setitem(sys.modules, name, module)
    names = {"__name__": "__main__"}
    for number, (language, code) in enumerate(_BLOCK.findall(text), 1):
        if language == "python":
            exec(compile(code, f"{page.name}, block {number}", "exec"), names)
        else:
            exit_code, said = run(code)
            assert exit_code == 0, f"{page.name}, block {number}\n{said}"
