"""Uploading to and loading from the hub, by huggingface_hub itself against a hub that runs here."""

from __future__ import annotations

import pytest
import yaml

from emma_adapter import CheckpointError, load_adapter, patch_model
from tests.support import fake_hub, tiny

_COMMON = """
import sys
import torch
from tests.support import tiny
from emma_adapter import CheckpointError, EmmaConfig, get_adapter, load_adapter, patch_model

def logits(model):
    with torch.no_grad():
        return model(**tiny.token_inputs([1, 2])).logits

def trained(seed):
    torch.manual_seed(seed)
    model = tiny.llava()
    model.config._name_or_path = "llava-hf/llava-1.5-7b-hf"
    adapter = patch_model(model)
    tiny.train_randomly(adapter.alignment, seed=seed)
    return adapter
"""


@pytest.fixture
def run(tmp_path):
    """Run a script that talks to a hub of its own, and the hub."""
    with fake_hub.for_scripts(tmp_path / "home") as (run, hub):
        yield lambda code, **more: run(_COMMON + code, **more), hub


@pytest.mark.slow
@pytest.mark.nightly
def test_uploaded_and_loaded_again(run, tmp_path):
    run, hub = run
    said = run(
        """
first, second = trained(1), trained(2)
print(first.push_to_hub("someone/my-adapter"))
print(second.push_to_hub("someone/my-adapter", revision="longer", commit_message="Train longer"))
for adapter, revision in ((first, None), (second, "longer"), (first, "main")):
    model = load_adapter(tiny.llava(), "someone/my-adapter", revision=revision).model
    assert torch.equal(logits(model), logits(adapter.model)), revision
"""
    )
    assert len(set(said.split())) == 2
    files = hub.branches["someone/my-adapter"]["main"][-1]
    assert set(files) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    card = files["README.md"].decode()
    assert 'load_adapter(model, "someone/my-adapter", processor=processor)' in card
    about = yaml.safe_load(card.split("---")[1])
    assert (about["base_model"], about["library_name"]) == ("llava-hf/llava-1.5-7b-hf", "emma_adapter")
    # Nothing but the adapter is fetched.
    hub.branches["someone/my-adapter"]["main"][-1]["pytorch_model.bin"] = b"large"
    hub.requests.clear()
    run('load_adapter(tiny.llava(), "someone/my-adapter")', HF_HOME=str(tmp_path / "another home"))
    assert hub.requests
    assert not any("pytorch_model" in request for request in hub.requests)
    # What was downloaded before needs no hub.
    hub.requests.clear()
    run('load_adapter(tiny.llava(), "someone/my-adapter", local_files_only=True)')
    assert not hub.requests


@pytest.mark.slow
@pytest.mark.nightly
def test_adapters_beside_a_model_or_a_lora(run):
    run, hub = run
    said = run(
        """
import tempfile
from pathlib import Path
from huggingface_hub import HfApi
from peft import LoraConfig, get_peft_model

adapter = trained(1)
expected = logits(adapter.model)
folder = tempfile.mkdtemp()
adapter.model.save_pretrained(folder)
HfApi().create_repo("someone/model")
HfApi().upload_folder(repo_id="someone/model", folder_path=folder)
folder = tempfile.mkdtemp()
wrapped = get_peft_model(adapter.model, LoraConfig(target_modules=["q_proj"]))
wrapped.save_pretrained(folder)
HfApi().create_repo("someone/lora")
HfApi().upload_folder(repo_id="someone/lora", folder_path=folder)
for repository in ("someone/model", "someone/lora"):
    assert torch.equal(logits(load_adapter(tiny.llava(), repository).model), expected), repository
    print(repository)
"""
    )
    assert said.split()[-2:] == ["someone/model", "someone/lora"]
    fetched = [request for request in hub.requests if "/resolve/" in request]
    assert fetched
    assert not [request for request in fetched if request.endswith("/model.safetensors")]


@pytest.mark.nightly
def test_a_private_repository_and_a_folder_in_it(run, tmp_path):
    run, hub = run
    adapter = patch_model(tiny.llava())
    adapter.save_pretrained(tmp_path / "adapter")
    files = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    nested = {f"runs [1]/last-checkpoint/{name}": content for name, content in files.items()}
    hub.branches["someone/own"] = {"main": [{**nested, "model.safetensors": b"large"}]}
    hub.private["someone/own"] = "hf_secret"
    run(
        """
import os
def load(**settings):
    return load_adapter(tiny.llava(), "someone/own", subfolder="runs [1]/last-checkpoint", **settings)
for settings in ({}, {"token": False}, {"token": True}, {"token": "hf_other"}):
    try:
        load(**settings)
        raise SystemExit(f"{settings} should not be enough")
    except CheckpointError as error:
        assert "token=" in str(error), error
load(token="hf_secret")
os.environ["HF_TOKEN"] = "hf_secret"
load(token=True)
load()
try:
    load_adapter(tiny.llava(), "someone/own", subfolder="runs [1]/first-checkpoint", token="hf_secret")
    raise SystemExit("there is none")
except CheckpointError as error:
    assert "first-checkpoint" in str(error), error
"""
    )
    assert not [request for request in hub.requests if request.endswith("/model.safetensors")]


def test_a_folder_in_a_folder(tmp_path):
    adapter = patch_model(tiny.llava())
    adapter.save_pretrained(tmp_path / "run" / "last-checkpoint")
    adapter.model.save_pretrained(tmp_path / "run" / "model")
    (tmp_path / "run" / "inside").symlink_to("last-checkpoint")
    for subfolder in ("last-checkpoint", "./last-checkpoint/", "model", "model/emma_adapter", "inside"):
        load_adapter(tiny.llava(), tmp_path / "run", subfolder=subfolder)
    load_adapter(tiny.llava(), tmp_path / "run" / "model", subfolder="")
    adapter.save_pretrained(tmp_path / "elsewhere")
    (tmp_path / "run" / "out").symlink_to(tmp_path / "elsewhere")
    outside = [
        "..",
        "../elsewhere",
        "model/../../elsewhere",
        "..\\elsewhere",
        "C:\\elsewhere",
        str(tmp_path / "elsewhere"),
    ]
    for subfolder in (*outside, "out", "out/.", "missing"):
        with pytest.raises(CheckpointError, match=r"leads out|a link out|no adapter_config\.json"):
            load_adapter(tiny.llava(), tmp_path / "run", subfolder=subfolder)


NOT_THERE = {
    'load_adapter(tiny.llava(), "someone/nothing")': "neither a folder here nor an adapter that the hub gives",
    'load_adapter(tiny.llava(), "no such / name")': "neither a folder here nor an adapter that the hub gives",
    'load_adapter(tiny.llava(), "a/b", local_files_only=True)': "neither a folder here nor",
    'trained(1).push_to_hub("someone/it"); load_adapter(tiny.llava(), "someone/it", revision="x")': "neither",
}


@pytest.mark.nightly
def test_what_the_hub_does_not_have(run):
    run, _ = run
    told = run(
        f"""
for code, cause in {NOT_THERE}.items():
    try:
        exec(code)
    except CheckpointError as error:
        assert cause in str(error), error
        print("caught")
"""
    )
    assert told.count("caught") == len(NOT_THERE)
