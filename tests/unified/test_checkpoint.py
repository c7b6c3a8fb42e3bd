"""Saved branches: in a fresh process, beside other things, interrupted, damaged, and of strangers."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from emma_adapter import (
    CheckpointError,
    ConfigError,
    DataError,
    EmmaError,
    PatchError,
    UnifiedConfig,
    load_adapter,
    load_unified,
    patch_model,
)
from emma_adapter.files import tensor_folder
from emma_adapter.unified.checkpoint import CONFIG_NAME, WEIGHTS_NAME
from tests.support import fake_hub, tiny
from tests.support.zoo import ZOO
from tests.unified.small import autoencoder, drawn, picture, seeded, unified

ENTRY = ZOO["qwen3_vl"]


def load(folder, model=None, **changes):
    settings = {"processor": ENTRY.processor(), "autoencoder": autoencoder(), **changes}
    return load_unified(ENTRY.model() if model is None else model, folder, **settings)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    adapter = unified("qwen3_vl", UnifiedConfig(decoupling=2, shared_layers=1))
    adapter.measure_latents(torch.rand(4, 3, 64, 64, generator=seeded(0)))
    adapter.save_pretrained(folder)
    torch.save(drawn(adapter, "x", picture(1), generator=seeded(0)), folder / "drawn.pt")
    return folder


@pytest.fixture
def copied(saved, tmp_path) -> Path:
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        (tmp_path / name).write_bytes((saved / name).read_bytes())
    return tmp_path


def test_a_fresh_process_draws_the_same(saved):
    code = f"""
import sys
sys.path[:0] = {[str(Path(__file__).parents[2])]!r}
import torch
from emma_adapter import load_unified
from tests.unified.small import ZOO, autoencoder, drawn, picture, seeded
torch.set_num_threads({torch.get_num_threads()})
entry = ZOO["qwen3_vl"]
adapter = load_unified(entry.model(), {str(saved)!r}, processor=entry.processor(), autoencoder=autoencoder())
adapter.set_progress_bar_config(disable=True)
assert torch.equal(drawn(adapter, "x", picture(1), generator=seeded(0)), torch.load({str(saved / "drawn.pt")!r}))
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize("config", [UnifiedConfig(decoupling="full", shared_layers=0), UnifiedConfig(decoupling=3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_weight_comes_back(tmp_path, config, dtype):
    adapter = unified("qwen3_vl", config, model=ENTRY.model().to(dtype))
    adapter.save_pretrained(tmp_path)
    again = load(tmp_path, ENTRY.model().to(dtype))
    assert again.config == adapter.config
    own, other = dict(adapter.named_parameters()), dict(again.named_parameters())
    assert own.keys() == other.keys()
    assert all(own[name].dtype == other[name].dtype and torch.equal(own[name], other[name]) for name in own)


@pytest.mark.nightly
def test_the_hub(saved, tmp_path):
    """A branch is loaded from there without what else is there, and uploaded beside it; a card is left as it is."""
    with fake_hub.for_scripts(tmp_path) as (run, hub):
        wanted = {name: (saved / name).read_bytes() for name in (CONFIG_NAME, WEIGHTS_NAME)}
        hub.branches["someone/model"] = {"main": [{"README.md": b"a model", "model.safetensors": b"of the base"}]}
        hub.branches["someone/drawing"] = {
            "main": [{**wanted, "model.safetensors": b"of the base", "deeper/unified_config.json": b"another"}]
        }
        said = run(
            f"""
import torch
from emma_adapter import CheckpointError, load_unified
from tests.unified.small import ZOO, autoencoder, drawn, picture, seeded
torch.set_num_threads({torch.get_num_threads()})
entry = ZOO["qwen3_vl"]
own = {{"processor": entry.processor(), "autoencoder": autoencoder()}}
def load(**options):
    return load_unified(entry.model(), "someone/drawing", **own, **options)
for options in ({{}}, {{"local_files_only": True}}):
    adapter = load(**options).set_progress_bar_config(disable=True)
    assert torch.equal(drawn(adapter, "x", picture(1), generator=seeded(0)), torch.load({str(saved / "drawn.pt")!r}))
for options in ({{"revision": "other"}}, {{"subfolder": "../.."}}):
    try:
        load(**options)
    except CheckpointError as error:
        print(error)
for repository in ("someone/model", "someone/new"):
    print("at", adapter.push_to_hub(repository, commit_message="Draw"))
print("at", adapter.push_to_hub("someone/shown", samples=[("a red five", picture(3))]))
"""
        )
    assert "neither a folder here nor an adapter that the hub gives" in said and "leads out" in said
    assert said.count("at http") == 3
    assert {"README.md", "unified_sample_0.png"} < set(hub.branches["someone/shown"]["main"][-1])
    assert not list(tmp_path.rglob("model.safetensors")), "more was downloaded than the branch"
    beside, alone = (hub.branches[f"someone/{name}"]["main"][-1] for name in ("model", "new"))
    assert set(beside) == {"README.md", "model.safetensors", CONFIG_NAME, WEIGHTS_NAME}
    assert beside["README.md"] == b"a model"
    assert set(alone) == {"README.md", CONFIG_NAME, WEIGHTS_NAME}
    assert 'load_unified(model, "someone/new", processor=processor, autoencoder=' in alone["README.md"].decode()


def test_what_is_written(saved):
    description = json.loads((saved / CONFIG_NAME).read_text())
    assert description["config"]["latent_mean"] == list(load(saved).config.latent_mean)
    assert description["autoencoder"]["source"] is None
    with safe_open(saved / WEIGHTS_NAME, framework="pt") as file:
        assert json.loads(file.metadata()["emma_unified"]) == description
        names = set(file.keys())
    assert "velocity.weight" in names and "layers.1.self_attn/v_proj/up" in names
    assert not any("autoencoder" in name or "emma" in name for name in names)
    assert "load_unified" in (saved / "README.md").read_text()


@pytest.mark.parametrize("prompt", ["a red five", 'a "five": [no], #yes\n<b>&', "eine Fünf ❄", "---"])
def test_samples_are_shown_by_the_card(tmp_path, prompt):
    """The card is read by the hub's own library."""
    adapter = unified("qwen3_vl", UnifiedConfig(decoupling=2))
    samples = [(prompt, picture(1)), ("make it blue", picture(2).convert("L"))]
    adapter.save_pretrained(tmp_path, samples=samples)
    card = ModelCard.load(tmp_path / "README.md")
    shown = card.data.to_dict()["widget"]
    assert [one["text"] for one in shown] == [prompt, "make it blue"]
    for (_, wanted), one in zip(samples, shown, strict=True):
        with Image.open(tmp_path / one["output"]["url"]) as found:
            assert found.convert("RGB").tobytes() == wanted.convert("RGB").tobytes()
    assert "<Gallery />" in card.text and "load_unified" in card.text
    load(tmp_path)


def test_samples_are_not_lost_where_a_card_is_a_link_to_nothing(tmp_path):
    (tmp_path / "README.md").symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match="samples go into a new one"):
        unified("qwen3_vl", UnifiedConfig(decoupling=2)).save_pretrained(tmp_path, samples=[("x", picture(1))])
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_the_base_is_saved_without_the_branch_and_the_branch_beside_it(tmp_path):
    adapter = unified("qwen3_vl", UnifiedConfig(decoupling=2))
    adapter.model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors")
    assert not any("emma" in name for name in names)
    base = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert set(base.state_dict()) == {key for key in adapter.model.state_dict() if not key.startswith("emma_unified.")}
    again = load(tmp_path, base).set_progress_bar_config(disable=True)
    want = drawn(adapter, "x", picture(1), generator=seeded(0))
    torch.testing.assert_close(drawn(again, "x", picture(1), generator=seeded(0)), want, atol=1e-6, rtol=1e-6)


def test_both_papers_adapters_lie_in_one_folder(tmp_path):
    adapter = unified("qwen3_vl", UnifiedConfig(decoupling=2))
    alignment = patch_model(adapter.model, processor=ENTRY.processor())
    tiny.train_randomly(alignment.alignment)
    adapter.model.save_pretrained(tmp_path / "both")
    assert not any("emma" in name for name in load_file(tmp_path / "both" / "model.safetensors"))
    alignment.save_pretrained(tmp_path / "one")
    adapter.save_pretrained(tmp_path / "one")
    for folder in ("both", "one"):
        model = ENTRY.model()
        load(tmp_path / folder, model)
        load_adapter(model, tmp_path / folder, processor=ENTRY.processor())
        for name, value in adapter.model.state_dict().items():
            assert torch.equal(model.state_dict()[name], value)


def test_a_loading_that_fails_leaves_the_model_as_it_was(copied):
    model = ENTRY.model()
    names = list(model.state_dict())
    values = load_file(copied / WEIGHTS_NAME)
    first = sorted(values)[-1]
    values[first] = values[first] + 1
    rewrite(copied, tensors=values)
    with pytest.raises(CheckpointError, match="SHA-256"):
        load(copied, model)
    assert list(model.state_dict()) == names
    assert not [name for name in vars(model) if "emma" in name]
    # With an adapter of the other kind on it, that stays.
    patch_model(model, processor=ENTRY.processor())
    with pytest.raises(CheckpointError, match="SHA-256"):
        load(copied, model)
    assert any("emma" in name for name in model.state_dict())


def rewrite(folder, change=lambda description: None, tensors=None):
    with safe_open(folder / WEIGHTS_NAME, framework="pt") as file:
        description = json.loads(file.metadata()["emma_unified"])
    change(description)
    values = load_file(folder / WEIGHTS_NAME) if tensors is None else tensors
    save_file(values, folder / WEIGHTS_NAME, metadata={"emma_unified": json.dumps(description)})
    (folder / CONFIG_NAME).write_text(json.dumps(description))


def test_the_config_file_may_change_how_it_is_trained_only(copied):
    description = json.loads((copied / CONFIG_NAME).read_text())
    description["config"]["noise_draws"] = 7
    (copied / CONFIG_NAME).write_text(json.dumps(description))
    assert load(copied).config.noise_draws == 7
    description["config"]["decoupling"] = 3
    (copied / CONFIG_NAME).write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match="decoupling"):
        load(copied)


def test_an_interrupted_save_is_the_new_one_or_the_old_one(copied):
    """The tensor file was replaced, the config file wasn't yet."""
    description = json.loads((copied / CONFIG_NAME).read_text())
    description["sha256"] = "older"
    description["config"]["shared_layers"] = 0
    (copied / CONFIG_NAME).write_text(json.dumps(description))
    assert load(copied).config.shared_layers == 1


def test_a_killed_save_leaves_the_old_file(copied):
    before = (copied / WEIGHTS_NAME).read_bytes()
    adapter = load(copied)
    if (child := os.fork()) == 0:
        try:

            def killed(tensors, path, metadata):
                save_file(tensors, path, metadata)
                os.kill(os.getpid(), signal.SIGKILL)

            tensor_folder.save_file = killed
            adapter.save_pretrained(copied)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert (copied / WEIGHTS_NAME).read_bytes() == before
    adapter.save_pretrained(copied)
    assert sorted(os.listdir(copied)) == ["README.md", CONFIG_NAME, WEIGHTS_NAME]


def test_a_diverged_branch_is_not_saved(copied):
    adapter = load(copied)
    with torch.no_grad():
        adapter.model.emma_unified.default.velocity["bias"][0] = float("nan")
    before = (copied / WEIGHTS_NAME).read_bytes()
    with pytest.raises(CheckpointError, match=r"velocity\.bias.*diverged"):
        adapter.save_pretrained(copied)
    assert (copied / WEIGHTS_NAME).read_bytes() == before


def test_weights_are_read_one_after_another(copied, monkeypatch):
    """No more than one tensor of the file is in memory beside the model's."""
    adapter = load(copied)
    largest = max(parameter.numel() * parameter.itemsize for parameter in adapter.parameters())
    made: list[int] = []
    real = torch.empty

    def empty(*shape, **options):
        tensor = real(*shape, **options)
        made.append(0 if tensor.is_meta else tensor.numel() * tensor.itemsize)
        return tensor

    watched = types.SimpleNamespace(**{**vars(torch), "empty": empty})
    monkeypatch.setattr(tensor_folder, "torch", watched)
    load(copied)
    assert 0 < max(made) <= largest


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS_NAME)


def _without(folder):
    values = tensors_of(folder)
    del values["velocity.bias"]
    rewrite(folder, tensors=values)


def _more(folder):
    rewrite(folder, tensors={**tensors_of(folder), "further": torch.zeros(1)})


def _misshapen(folder):
    rewrite(folder, tensors={**tensors_of(folder), "velocity.bias": torch.zeros(3)})


def _integers(folder):
    rewrite(folder, tensors={**tensors_of(folder), "velocity.bias": torch.zeros(8, dtype=torch.int64)})


def _nan(folder):
    rewrite(folder, tensors={**tensors_of(folder), "velocity.bias": torch.full((8,), float("nan"))})


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


def _fifo(folder):
    (folder / WEIGHTS_NAME).unlink()
    os.mkfifo(folder / WEIGHTS_NAME)


WRONG = {
    "missing": (_without, "missing tensor"),
    "more": (_more, "unexpected tensor"),
    "misshapen": (_misshapen, r"is \[3\] and should be \[8\]"),
    "integers": (_integers, "int64"),
    "nan": (_nan, "NaN"),
    "no config": (lambda folder: (folder / CONFIG_NAME).unlink(), "there is no unified_config"),
    "no weights": (lambda folder: (folder / WEIGHTS_NAME).unlink(), "there is no unified_model"),
    "not json": (lambda folder: (folder / CONFIG_NAME).write_text("{"), "not valid JSON"),
    "not text": (lambda folder: (folder / CONFIG_NAME).write_bytes(b"\xff\xfe"), "can't be read"),
    "endless": (lambda folder: (folder / CONFIG_NAME).write_text(" " * 2**21), "more than"),
    "foreign": (lambda folder: (folder / CONFIG_NAME).write_text('{"peft_type": "LORA"}'), "with peft"),
    "cut": (lambda folder: os.truncate(folder / WEIGHTS_NAME, 3000), "not a valid safetensors"),
    "foreign weights": (lambda folder: save_file(tensors_of(folder), folder / WEIGHTS_NAME), "metadata lacks"),
    "newer": (_set("format_version", value=9), "upgrade"),
    "no version": (_set("format_version", value="1"), "format_version"),
    "no digest": (_set("sha256", value=None), "sha256"),
    "wrong digest": (_set("sha256", value="0" * 64), "SHA-256"),
    "no autoencoder": (_set("autoencoder", value=[]), "config_sha256"),
    "unknown field": (_set("config", "magic", value=1), "unknown config field"),
    "bad value": (_set("config", "time_shift", value=-1), "time_shift"),
    "no object": (_set("config", value=[]), "JSON object"),
    "other model": (_set("model_type", value="llava"), "'llava'"),
    "a pipe": (_fifo, "a pipe"),
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


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damaged_bytes_are_an_error_of_this_library_or_nothing(saved, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damaged")
    name = data.draw(st.sampled_from([CONFIG_NAME, WEIGHTS_NAME]))
    for each in (CONFIG_NAME, WEIGHTS_NAME):
        content = bytearray((saved / each).read_bytes())
        if each == name:
            at = data.draw(st.integers(0, min(len(content), 6000) - 1))
            content[at : at + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=9))
        (folder / each).write_bytes(bytes(content))
    with contextlib.suppress(EmmaError):
        load(folder)


@pytest.mark.parametrize("changes", [{"channels": 4}, {"compression": 16}])
def test_another_kind_of_autoencoder_is_refused(saved, changes):
    model = ENTRY.model()
    with pytest.raises(ConfigError, match=r"latent_channels=4|compression=16"):
        load(saved, model, autoencoder=autoencoder(**changes))
    assert not [name for name in model.state_dict() if "emma" in name]


def test_an_autoencoder_with_another_config_is_warned_of(saved):
    other = autoencoder()
    factor = other.config.scaling_factor
    other.register_to_config(scaling_factor=0.25)
    try:
        with pytest.warns(UserWarning, match="another autoencoder"):
            load(saved)
    finally:
        other.register_to_config(scaling_factor=factor)
    load(saved)


def test_a_model_that_draws_already_is_refused(saved):
    adapter = load(saved)
    with pytest.raises(PatchError, match="unpatch_model"):
        load(saved, adapter.model)
    assert drawn(adapter.set_progress_bar_config(disable=True)).isfinite().all()


def test_an_empty_folder_is_told_what_would_have_filled_it(tmp_path):
    with pytest.raises(CheckpointError, match=r"give the folder that unified\.save_pretrained wrote"):
        load(tmp_path)


def test_a_gathered_state_dict_says_where_weights_are_and_not_what_is_written(tmp_path):
    """As accelerate's documentation has it: ``state_dict=accelerator.get_state_dict(model)``."""
    made = unified("qwen3_vl", UnifiedConfig(decoupling=2))
    made.train_only()
    base = {name: value for name, value in made.model.state_dict().items() if "emma" not in name}
    made.model.save_pretrained(tmp_path, state_dict=made.model.state_dict())
    again, info = type(made.model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]
    assert all(torch.equal(value, base[name]) for name, value in again.state_dict().items())
