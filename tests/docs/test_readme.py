"""The README is true: its table of models, its promises; and so is the snippet that adds a model."""

from __future__ import annotations

import ast
import re
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch

import emma_adapter
from emma_adapter import EmmaConfig, patch_model
from emma_adapter.alignment.fusion import fusion_names
from emma_adapter.models import families, registry
from tests.support import tiny
from tests.support.deepseek import IMAGE_SIZE, TOKENS_PER_IMAGE, deepseek_vl
from tests.support.zoo import ZOO, florence2, mllama, nemotron_h_omni, phi4_multimodal
from tests.unified.test_fusion import documented as drawing_families

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
# Classes that are not part of transformers, and the tests that hold them to the contract.
ORIGINAL_CLASSES = {"internvl_chat", "llava_llama", "llava_mistral", "llava_qwen"}
# Where the plain model can't do what the contract asks, a family has tests of its own.
APART = (florence2, mllama, nemotron_h_omni, phi4_multimodal)
ENTRIES = {**ZOO, **{module.ENTRY.name: module.ENTRY for module in APART}}


def support_table() -> tuple[list[str], dict[str, list[str]]]:
    """The columns, and the cells of each model type."""
    lines = README.split("<!-- support table")[1].split("\n\n")[0].splitlines()[1:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return cells[0], {re.match(r"`(\w+)`", row[0])[1]: row[1:] for row in cells[2:]}


def families_of_this_package() -> dict[str, families.ModelFamily]:
    entries = entry_points(group=registry.ENTRY_POINT_GROUP)
    return {entry.name: entry.load()() for entry in entries if entry.value.startswith("emma_adapter.")}


def test_every_registered_family_has_a_row_and_a_contract():
    registered = set(families_of_this_package())
    assert set(support_table()[1]) == registered
    assert {entry.model().config.model_type for entry in ENTRIES.values()} | ORIGINAL_CLASSES == registered


def test_the_table_has_a_column_for_every_fusion():
    columns = support_table()[0]
    fusions = ["`attention`", "`modulation`", "`linear`"]
    assert columns == ["`config.model_type`", "images", "tiles", "video", *fusions, "draws"]
    # MoDA's, behind the projector, is for all families alike: patching/test_after_projector.py.
    assert {column.strip("`") for column in fusions} | {"moda"} == set(fusion_names())


@pytest.mark.parametrize("name", families_of_this_package())
def test_a_row_says_what_the_family_says(name):
    family = families_of_this_package()[name]
    images, tiles, video, attention, modulation, linear, draws = support_table()[1][name]
    assert (images == "✓") == ("image" in family.modalities)
    assert (tiles == "✓") == family.tiles
    assert (video == "✓") == ("video" in family.modalities)
    assert attention == modulation == "✓"
    assert (draws == "✓") == drawing_families()[name]
    if name in ENTRIES:
        model = ENTRIES[name].model()
        assert (linear == "resampled") == (not family.has_fixed_size(family.inner(model)))
        assert ENTRIES[name].videos == ("video" in family.modalities)
    else:
        assert linear == "✓"


def promises() -> list[tuple[str, str, list[str]]]:
    """Each promise, how much of it ``make test`` tries, and the tests that hold it."""
    lines = README.split("<!-- promises")[1].split("\n\n")[0].splitlines()[3:]
    rows = [line.strip("|").split("|") for line in lines]
    return [(promise.strip(), tier.strip(), re.findall(r"`([^`]+)`", tests)) for promise, tests, tier in rows]


def tier_of(test: str) -> str:
    """As the source says: marked for the night, or asking the budget, itself or by a name of its module."""
    path, _, name = test.partition("::")
    tree = ast.parse((ROOT / "tests" / path).read_text())
    nodes = {node.name: node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    assert name in nodes, f"{test}: there is no such test"
    if "pytest.mark.nightly" in map(ast.unparse, nodes[name].decorator_list):
        return "at night"
    asking = {"budget", "combinations", "some"}
    for node in tree.body:
        if isinstance(node, ast.Assign) and asking & _names(node.value):
            asking |= _names(*node.targets)
    # Of a state machine its runs, which are settings of what pytest collects.
    runs = [node for node in tree.body if isinstance(node, ast.Assign) and name in _names(*node.targets)]
    return "each time, more at night" if asking & _names(nodes[name], *runs) else "each time"


def _names(*nodes: ast.AST) -> set[str]:
    return {node.id for tree in nodes for node in ast.walk(tree) if isinstance(node, ast.Name)}


def test_every_promise_is_held_by_a_test_of_the_tier_that_it_names():
    assert len(promises()) >= 20
    for promise, tier, named in promises():
        assert named, promise
        tiers = set(map(tier_of, named))
        assert tier == (tiers.pop() if len(tiers) == 1 else "each time, more at night"), promise


def test_the_site_has_the_same_table():
    table = README.split("<!-- support table")[1].split("\n", 1)[1].split("\n\n")[0]
    assert table in (ROOT / "docs" / "families" / "index.md").read_text()


def snippet_after(comment: str) -> str:
    return (ROOT / "docs" / "adding-a-family.md").read_text().split(comment)[1].split("```python\n")[1].split("```")[0]


@pytest.mark.parametrize("fusion", ["modulation", "linear"])
def test_the_snippet_that_adds_a_family(fusion, monkeypatch):
    monkeypatch.setattr(registry, "_FAMILIES", {})
    snippet = snippet_after("<!-- tests/docs/test_readme.py runs this -->")
    assert len([line for line in snippet.splitlines() if line.strip()]) <= 12
    model = deepseek_vl()
    with pytest.raises(emma_adapter.UnsupportedModelError, match="deepseek_vl"):
        patch_model(model)
    exec(snippet, namespace := {"model": model})
    adapter = namespace["adapter"]
    if fusion != "modulation":
        emma_adapter.unpatch_model(model)
        adapter = patch_model(model, EmmaConfig(fusion=fusion))
    image = [model.config.image_token_id] * TOKENS_PER_IMAGE
    ids = torch.tensor([[1, *image, 10, 11], [1, *image, 12, 13]])
    inputs = {"input_ids": ids, "pixel_values": torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)}
    with torch.no_grad():
        before = model(**inputs).logits
        tiny.train_randomly(adapter.alignment)
        after = model(**inputs).logits
        alone = model(input_ids=ids[1:], pixel_values=inputs["pixel_values"][1:]).logits
    assert (after - before).abs().amax(dim=(1, 2)).min() > 1e-3
    torch.testing.assert_close(after[1:], alone, atol=2e-5, rtol=0)
