"""Promises about the package itself."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch

import emma_adapter
from emma_adapter import ModelFamily, UnsupportedModelError, patch_model, register_family
from emma_adapter.integrations.llava import LlavaFamily
from emma_adapter.models import registry
from tests.support import tiny

ROOT = Path(__file__).parents[1]
# Lower layers first: a file may import from its own folder or from a lower layer; folders of one line are strangers.
LAYERS = """
errors version
messages
files modules models kernels
alignment unified experts
instructions
patching
checkpoints
adapter
__init__
data analysis
report evaluation
cli
"""
LAYER_OF = {name: number for number, line in enumerate(LAYERS.split("\n")) for name in line.split()}


def imports_of(path: Path) -> set[str]:
    """Modules imported at module level and inside functions, absolute names; type-only imports left out."""
    tree = ast.parse(path.read_text())
    found = set()

    class Visitor(ast.NodeVisitor):
        def visit_If(self, node: ast.If) -> None:
            if not (isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
                self.generic_visit(node)

        def visit_Import(self, node: ast.Import) -> None:
            found.update(alias.name for alias in node.names)

        def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
            package = ["emma_adapter", *path.relative_to(ROOT / "emma_adapter").parts[:-1]]
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            name = f"{base}.{node.module}" if base and node.module else node.module or base
            if base and not node.module:
                found.update(f"{base}.{alias.name}" for alias in node.names)
            else:
                found.add(name)

    Visitor().visit(tree)
    return found


CORE = sorted((ROOT / "emma_adapter").rglob("*.py"))


@pytest.mark.parametrize("path", CORE, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    own = path.relative_to(ROOT / "emma_adapter").parts[0].removesuffix(".py")
    for name in imports_of(path):
        assert not name.startswith("emma_adapter.integrations"), "the core must not import an integration"
        if name.startswith("emma_adapter."):
            other = name.split(".")[1]
            assert other == own or LAYER_OF[other] < LAYER_OF[own], f"{path.name} imports {name} from a higher layer"


def test_no_file_imports_itself_by_way_of_others():
    modules = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in CORE}
    graph = {
        module: {name for name in imports_of(path) if name in modules.values()} - {module}
        for path, module in modules.items()
    }
    TopologicalSorter(graph).prepare()


def test_the_documentation_draws_the_same_layers():
    page = (ROOT / "docs" / "architecture.md").read_text().split("<!-- layers")[1].split("```")[1]
    drawn = [line.split()[0] for line in page.splitlines()[1:]]
    assert sorted(drawn) == sorted(set(LAYER_OF) - {"__init__", "version"})
    assert [LAYER_OF[name] for name in drawn] == sorted((LAYER_OF[name] for name in drawn), reverse=True)


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_every_file_that_the_pages_name_is_there(page):
    text = (ROOT / page).read_text()
    named = re.findall(r"(?<![\w*])\w[\w./]*\.py\b|\w[\w/]*/(?=`)", text)
    folders = ("emma_adapter", "integrations", "tests", "benchmarks", "docs", ".ci")
    there = [
        f"/{path.relative_to(ROOT)}" for folder in folders for path in [ROOT / folder, *(ROOT / folder).rglob("*")]
    ]
    missing = {name for name in named if not any(path.endswith(f"/{name.rstrip('/')}") for path in there)}
    assert len(named) > 10 and not missing


def test_importing_the_package_imports_no_heavy_third_party():
    heavy = (
        "torch",
        "transformers",
        "open_clip",
        "peft",
        "accelerate",
        "datasets",
        "trl",
        "triton",
        "click",
        "matplotlib",
        "sklearn",
        "jinja2",
    )
    code = f"import sys, emma_adapter; print(sorted({set(heavy)} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_wheel_holds_every_folder():
    tomllib = pytest.importorskip("tomllib")
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "emma_adapter").rglob("__init__.py")}
    names = {".".join(folder.parts) for folder in folders}
    assert set(told) == names | {"emma_adapter.integrations", "emma_adapter_lmms_eval"}


def test_public_names_exist_and_are_documented():
    for name in emma_adapter.__all__:
        value = getattr(emma_adapter, name)
        assert name == "__version__" or (value.__doc__ or "").strip()


def test_names_are_imported_when_they_are_asked_for():
    """For tools that read the source, and for those that ask the module."""
    tree = ast.parse((ROOT / "emma_adapter" / "__init__.py").read_text())
    [typed] = [node for node in tree.body if isinstance(node, ast.If)]
    homes = {alias.name: node.module for node in typed.body for alias in node.names}
    assert homes == emma_adapter._HOMES
    code = """
import sys
import emma_adapter
before = set(dir(emma_adapter))
assert set(emma_adapter.__all__) <= before and "torch" not in sys.modules
from emma_adapter import *
assert patch_model is emma_adapter.patch_model is emma_adapter.adapter.patch.patch_model
assert all(name in globals() for name in emma_adapter.__all__)
assert not hasattr(emma_adapter, "nonsense")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_advertised_family_loads():
    found = entry_points(group=registry.ENTRY_POINT_GROUP)
    assert {"llava"} <= set(found.names)
    for entry in found:
        family = entry.load()()
        assert isinstance(family, ModelFamily)
        assert entry.name in family.model_types


@pytest.fixture
def _registry(monkeypatch):
    monkeypatch.setattr(registry, "_FAMILIES", {})


@pytest.mark.usefixtures("_registry")
def test_a_user_can_register_a_family():
    class Renamed(LlavaFamily):
        model_types = ("my_llava",)

    model = tiny.llava()
    model.config.model_type = "my_llava"
    assert type(registry.find_family(model)) is LlavaFamily
    register_family(Renamed())
    adapter = patch_model(model)
    assert type(adapter._state.family) is Renamed
    assert "my_llava" in repr(adapter)
    with torch.no_grad():
        model(**tiny.token_inputs([1]))


@pytest.mark.usefixtures("_registry")
def test_a_broken_third_party_integration_is_named_and_hurts_nobody_else(monkeypatch):
    class Broken:
        name, value, dist = "broken", "nowhere:Family", None

        def load(self):
            raise ImportError("no module named nowhere")

    real = registry.entry_points
    monkeypatch.setattr(registry, "entry_points", lambda group: [*real(group=group), Broken()])
    model = tiny.llava()
    model.config.model_type = "broken"
    with pytest.raises(UnsupportedModelError, match=r"nowhere:Family.*no module named nowhere"):
        patch_model(model)
    model.config.model_type = "llava"
    patch_model(model)


def test_changelog_names_the_version():
    assert f"[{emma_adapter.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
