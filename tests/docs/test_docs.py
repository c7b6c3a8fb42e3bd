"""Every example in the documentation runs: a page's blocks one after another, in the folder of ``workspace.py``.

``python`` blocks of a page share their names; ``bash`` blocks run in a shell that stops at the first error.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from emma_adapter.alignment.fusion import registry
from emma_adapter.models import families
from tests.support.workspace import llava_package, make_workspace

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
#: Generated from docstrings.
WITHOUT_EXAMPLES = {"api.md"}
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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", [page for page in PAGES if _BLOCK.search(page.read_text())], ids=name_of)
def test_page(page, tmp_path, monkeypatch):
    text = page.read_text()
    monkeypatch.chdir(make_workspace(tmp_path, text))
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for module, register in ((families, "_FAMILIES"), (registry, "FUSIONS")):  # what a page registers goes again
        monkeypatch.setattr(module, register, dict(getattr(module, register)))
    for name, module in llava_package().items():
        monkeypatch.setitem(sys.modules, name, module)
    names = {"__name__": "__main__"}
    for number, (language, code) in enumerate(_BLOCK.findall(text), 1):
        if language == "python":
            exec(compile(code, f"{page.name}, block {number}", "exec"), names)
        else:
            done = subprocess.run(["bash", "-euo", "pipefail", "-c", code], check=False, capture_output=True, text=True)
            assert done.returncode == 0, f"{page.name}, block {number}\n{done.stdout}\n{done.stderr}"
