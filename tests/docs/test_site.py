"""The documentation's site: it is built without a warning, holds every page, and fetches nothing from elsewhere."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import emma_adapter
import emma_adapter.analysis
import emma_adapter.report
from emma_adapter.models.registry import family_names

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
NAMES = ["emma_adapter", "analysis", "report"]
CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text())


def pages_of(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    else:
        for entry in nav.values() if isinstance(nav, dict) else nav:
            yield from pages_of(entry)


def test_every_page_is_in_the_navigation_once():
    assert sorted(pages_of(CONFIG["nav"])) == sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))


@pytest.mark.parametrize("name", family_names())
def test_every_family_has_a_page(name):
    pages = [page for page in (DOCS / "families").glob("*.md") if page.name != "index.md"]
    assert any(f"`{name}`" in page.read_text() for page in pages)
    assert f"`{name}`" in (DOCS / "families" / "index.md").read_text()


@pytest.mark.parametrize("package", [emma_adapter, emma_adapter.analysis, emma_adapter.report], ids=NAMES)
def test_the_reference_has_every_public_name(package):
    pattern = rf"^::: {re.escape(package.__name__)}\.(\w+)$"
    described = re.findall(pattern, (DOCS / "api.md").read_text(), re.MULTILINE)
    assert sorted(described) == sorted(set(package.__all__) - {"__version__"})


def test_links_of_the_readme_lead_to_pages():
    readme = (ROOT / "README.md").read_text()
    links = re.findall(r"\]\(((?!https?:)[^)#\s]+)", readme)
    assert [link for link in links if not (ROOT / link).exists()] == []
    assert "docs/index.md" in links


def test_what_was_measured_is_told_alike():
    measured = (ROOT / "benchmarks" / "results" / "digits-ablation-short-bases.md").read_text()
    tables = re.findall(r"^\|.*?(?=\n\n)", measured, re.MULTILINE | re.DOTALL)[:4]
    assert tables[0] in (ROOT / "README.md").read_text()
    page = (DOCS / "fusions.md").read_text()
    assert [table for table in tables if table not in page] == []


def test_the_papers_numbers_are_told_alike():
    benchmarks = (ROOT / "benchmarks" / "README.md").read_text().split("## The paper's tables")[1]
    page = (DOCS / "paper.md").read_text()
    assert re.findall(r"^```console$.*?^```$", benchmarks, re.MULTILINE | re.DOTALL) == re.findall(
        r"^```console$.*?^```$", page, re.MULTILINE | re.DOTALL
    )
    # | benchmark | task | metric, if there is one | paper | paper | measured | measured |
    rows = re.findall(r"^(\| .+? \|) .+ \| ([\d.]+|not given) \| ([\d.]+) \|", benchmarks, re.MULTILINE)
    assert len(rows) == 14
    for benchmark, base, emma in rows:
        assert re.search(rf"^{re.escape(benchmark)} .+ \| {base} \| {emma} \|$", page, re.MULTILINE), benchmark


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("zensical")
    pytest.importorskip("mkdocstrings_handlers.python")
    folder = tmp_path_factory.mktemp("site")
    shutil.copy(ROOT / "mkdocs.yml", folder)
    shutil.copytree(DOCS, folder / "docs")
    shutil.copytree(ROOT / ".ci", folder / ".ci")
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    done = subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "site"


@pytest.mark.nightly
def test_the_site_is_built_without_a_warning(site):
    assert {page.relative_to(DOCS).with_suffix(".html") for page in DOCS.rglob("*.md")} <= {
        page.relative_to(site) for page in site.rglob("*.html")
    }


@pytest.mark.nightly
def test_pages_load_nothing_from_elsewhere(site):
    for page in site.rglob("*.html"):
        text = page.read_text()
        loaded = re.findall(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"?((?:https?:)?//[^\"\s>]+)", text)
        loaded += re.findall(r"<link\b(?![^>]*\bcanonical\b)[^>]*\bhref=\"?((?:https?:)?//[^\"\s>]+)", text)
        assert loaded == [], page


@pytest.mark.nightly
def test_the_reference_is_readable(site):
    text = (site / "api.html").read_text()
    for name in set(emma_adapter.__all__) - {"__version__"}:
        assert f'id="emma_adapter.{name}"' in text
    assert re.findall(r":(?:class|func|meth|attr|mod):", text) == []
    # Comments that begin with "#:" count as docstrings.
    assert "Tokens that each medium takes in the language model." in text
