"""Saved experts: in a fresh process, beside other things, interrupted, damaged, and of strangers."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from emma_adapter import (
    CheckpointError,
    EmmaError,
    PatchError,
    add_vision_expert,
    load_vision_experts,
)
from emma_adapter.experts.checkpoint import CONFIG_NAME, WEIGHTS_NAME
from emma_adapter.files import tensor_folder
from tests.experts.small import ROWS, WITH_EXPERTS, change, features, learn_router, pixels_of, same, with_expert
from tests.support import fake_hub
from tests.support.budget import budget
from tests.support.zoo import ZOO

ENTRY = ZOO["qwen3_vl"]
KEY = "emma_vision_experts"


def load(folder, model=None, **changes):
    return load_vision_experts(ENTRY.model() if model is None else model, folder, **changes)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    experts = with_expert(ENTRY.name, layers=2)
    add_vision_expert(experts.model, "maps", margin=0.1)
    change(experts, "maps", seed=1)
    batch = ENTRY.batch(ROWS)
    learn_router(experts, ["stem", "maps", "original", "stem"], pixels_of(batch))
    experts.save_pretrained(folder)
    torch.save(features(experts.model, batch), folder / "features.pt")
    return folder


@pytest.fixture
def copied(saved, tmp_path) -> Path:
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        (tmp_path / name).write_bytes((saved / name).read_bytes())
    return tmp_path


SAME = """
import sys
sys.path[:0] = [{root!r}]
import torch
from emma_adapter import CheckpointError, load_vision_experts
from tests.experts.small import ROWS, ZOO, features, same
torch.set_num_threads({threads})
entry = ZOO["qwen3_vl"]
def check(experts):
    assert all(same(features(experts.model, entry.batch(ROWS)), torch.load({features!r})))
"""


def script(saved: Path) -> str:
    root, threads = str(Path(__file__).parents[2]), torch.get_num_threads()
    return SAME.format(root=root, threads=threads, features=str(saved / "features.pt"))


@pytest.mark.nightly
def test_a_fresh_process_computes_the_same(saved):
    code = f"{script(saved)}\ncheck(load_vision_experts(entry.model(), {str(saved)!r}))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize("name", budget(("llava", "llava_pixtral", "internvl"), WITH_EXPERTS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_weight_comes_back(tmp_path, name, dtype):
    experts = with_expert(name, model=ZOO[name].model().to(dtype), margin=0.3)
    experts.save_pretrained(tmp_path)
    again = load(tmp_path, ZOO[name].model().to(dtype))
    assert (again.names, again.layers, again.margin) == (experts.names, experts.layers, 0.3)
    own, other = dict(experts.named_parameters()), dict(again.named_parameters())
    assert own.keys() == other.keys()
    assert all(own[key].dtype == other[key].dtype and torch.equal(own[key], other[key]) for key in own)


@pytest.mark.slow
@pytest.mark.nightly
def test_the_hub(saved, tmp_path):
    """Experts are loaded from there without what else is there, and uploaded beside it."""
    with fake_hub.for_scripts(tmp_path) as (run, hub):
        wanted = {name: (saved / name).read_bytes() for name in (CONFIG_NAME, WEIGHTS_NAME)}
        hub.branches["someone/stem"] = {"main": [{**wanted, "model.safetensors": b"of the base"}]}
        hub.branches["someone/model"] = {"main": [{"README.md": b"a model", "model.safetensors": b"of the base"}]}
        said = run(
            f"""{script(saved)}
for options in ({{}}, {{"local_files_only": True}}):
    check(load_vision_experts(entry.model(), "someone/stem", **options))
for options in ({{"revision": "other"}}, {{"subfolder": "../.."}}):
    try:
        load_vision_experts(entry.model(), "someone/stem", **options)
    except CheckpointError as error:
        print(error)
experts = load_vision_experts(entry.model(), "someone/stem")
for repository in ("someone/model", "someone/new"):
    print("at", experts.push_to_hub(repository))
"""
        )
    assert "neither a folder here nor an adapter that the hub gives" in said and "leads out" in said
    assert said.count("at http") == 2
    assert not list(tmp_path.rglob("model.safetensors")), "more was downloaded than the experts"
    beside, alone = (hub.branches[f"someone/{name}"]["main"][-1] for name in ("model", "new"))
    assert set(beside) == {"README.md", "model.safetensors", CONFIG_NAME, WEIGHTS_NAME}
    assert beside["README.md"] == b"a model"
    assert set(alone) == {"README.md", CONFIG_NAME, WEIGHTS_NAME}
    assert 'load_vision_experts(model, "someone/new")' in alone["README.md"].decode()


def test_what_is_written(saved):
    description = json.loads((saved / CONFIG_NAME).read_text())
    assert description["config"] == {"experts": ["stem", "maps"], "layers": 2, "margin": 0.1}
    with safe_open(saved / WEIGHTS_NAME, framework="pt") as file:
        assert json.loads(file.metadata()[KEY]) == description
        names = set(file.keys())
    assert {"experts.stem/0/linear_fc1/weight", "experts.maps/1/linear_fc2/bias", "router.maps/bias"} <= names
    assert "load_vision_experts" in (saved / "README.md").read_text()


def test_the_base_is_saved_without_experts_and_they_beside_it(saved, tmp_path):
    model = ENTRY.model()
    experts = load(saved, model)
    model.save_pretrained(tmp_path)
    assert not any("emma" in name for name in load_file(tmp_path / "model.safetensors"))
    base = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    again = load(tmp_path, base)
    assert again.names == experts.names
    for one, other in zip(features(base, ENTRY.batch(ROWS)), features(model, ENTRY.batch(ROWS)), strict=True):
        torch.testing.assert_close(one, other)


def test_a_loading_that_fails_leaves_the_model_as_it_was(copied):
    model = ENTRY.model()
    names, attributes = list(model.state_dict()), set(vars(model))
    values = load_file(copied / WEIGHTS_NAME)
    last = sorted(values)[-1]
    rewrite(copied, tensors={**values, last: values[last] + 1})
    with pytest.raises(CheckpointError, match="SHA-256"):
        load(copied, model)
    assert list(model.state_dict()) == names and set(vars(model)) == attributes
    want = features(ENTRY.model(), ENTRY.batch(ROWS))
    assert all(same(features(model, ENTRY.batch(ROWS)), want))


def rewrite(folder, change=lambda description: None, tensors=None):
    with safe_open(folder / WEIGHTS_NAME, framework="pt") as file:
        description = json.loads(file.metadata()[KEY])
    change(description)
    values = load_file(folder / WEIGHTS_NAME) if tensors is None else tensors
    save_file(values, folder / WEIGHTS_NAME, metadata={KEY: json.dumps(description)})
    (folder / CONFIG_NAME).write_text(json.dumps(description))


def test_the_config_file_may_change_the_margin_only(copied):
    description = json.loads((copied / CONFIG_NAME).read_text())
    description["config"]["margin"] = 0.7
    (copied / CONFIG_NAME).write_text(json.dumps(description))
    assert load(copied).margin == 0.7
    description["config"]["layers"] = 1
    (copied / CONFIG_NAME).write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match="layers"):
        load(copied)


def test_a_killed_save_leaves_the_old_file(copied):
    before = (copied / WEIGHTS_NAME).read_bytes()
    experts = load(copied)
    if (child := os.fork()) == 0:
        try:

            def killed(tensors, path, metadata):
                save_file(tensors, path, metadata)
                os.kill(os.getpid(), signal.SIGKILL)

            tensor_folder.save_file = killed
            experts.save_pretrained(copied)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert (copied / WEIGHTS_NAME).read_bytes() == before
    experts.save_pretrained(copied)
    assert sorted(os.listdir(copied)) == ["README.md", WEIGHTS_NAME, CONFIG_NAME]


def test_diverged_experts_are_not_saved(copied):
    experts = load(copied)
    with torch.no_grad():
        experts.model.emma_experts.router["stem/bias"].fill_(float("nan"))
    before = (copied / WEIGHTS_NAME).read_bytes()
    with pytest.raises(CheckpointError, match=r"router\.stem/bias.*diverged"):
        experts.save_pretrained(copied)
    assert (copied / WEIGHTS_NAME).read_bytes() == before


def _tensors(**changes):
    def spoil(folder):
        values = {**load_file(folder / WEIGHTS_NAME), **{name.replace("_", "/"): v for name, v in changes.items()}}
        rewrite(folder, tensors={name: value for name, value in values.items() if value is not None})

    return spoil


def _set(*path, value):
    def change(folder):
        def edit(description):
            for name in path[:-1]:
                description = description[name]
            description[path[-1]] = value

        rewrite(folder, edit)

    return change


def _link(folder):
    outside = folder.parent / f"{folder.name}-outside"
    (folder / WEIGHTS_NAME).rename(outside)
    (folder / WEIGHTS_NAME).symlink_to(outside)


WRONG = {
    "missing": (_tensors(**{"router.stem_bias": None}), "missing tensor"),
    "more": (_tensors(further=torch.zeros(1)), "unexpected tensor"),
    "misshapen": (_tensors(**{"router.stem_bias": torch.zeros(3)}), r"is \[3\] and should be \[1\]"),
    "nan": (_tensors(**{"router.stem_bias": torch.full((1,), float("nan"))}), "NaN"),
    "no config": (
        lambda folder: (folder / CONFIG_NAME).unlink(),
        r"folder that experts\.save_pretrained wrote",
    ),
    "foreign": (lambda folder: (folder / CONFIG_NAME).write_text('{"format": "emma_unified"}'), "with the tool"),
    "cut": (lambda folder: os.truncate(folder / WEIGHTS_NAME, 3000), "not a valid safetensors"),
    "newer": (_set("format_version", value=9), "upgrade"),
    "wrong digest": (_set("sha256", value="0" * 64), "SHA-256"),
    "unknown field": (_set("config", "magic", value=1), "object of"),
    "no object": (_set("config", value=[]), "object of"),
    "a name of two": (_set("config", "experts", value=["stem", "stem"]), "already"),
    "no name": (_set("config", "experts", value=[1]), "name"),
    "many": (_set("config", "experts", value=[f"e{number}" for number in range(65)]), "1 to 64"),
    "no list": (_set("config", "experts", value="stem"), "names"),
    "bad margin": (_set("config", "margin", value="0.1"), "margin"),
    "other model": (_set("model_type", value="llava"), "'llava'"),
    "a link": (_link, "link out of"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_with_a_folder_is_told(copied, name):
    spoil, says = WRONG[name]
    spoil(copied)
    model = ENTRY.model()
    with pytest.raises(CheckpointError, match=says):
        load(copied, model)
    assert not [name for name in model.state_dict() if "emma" in name]


@pytest.mark.parametrize("layers", [7, 10**30])
def test_a_config_of_more_layers_than_the_model_has(copied, layers):
    rewrite(copied, lambda description: description["config"].update(layers=layers))
    with pytest.raises(CheckpointError, match="layers"):
        load(copied)


@settings(max_examples=budget(30, 300), deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damaged_bytes_are_an_error_of_this_library_or_nothing(saved, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damaged")
    name = data.draw(st.sampled_from([CONFIG_NAME, WEIGHTS_NAME]))
    for each in (CONFIG_NAME, WEIGHTS_NAME):
        content = bytearray((saved / each).read_bytes())
        if each == name:
            at = data.draw(st.integers(0, min(len(content), 4000) - 1))
            content[at : at + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=9))
        (folder / each).write_bytes(bytes(content))
    with contextlib.suppress(EmmaError):
        load(folder)


def test_a_model_that_has_experts_is_refused(saved):
    experts = load(saved)
    with pytest.raises(PatchError, match=r"remove\(\) first"):
        load(saved, experts.model)
    assert experts.names == ("stem", "maps")
