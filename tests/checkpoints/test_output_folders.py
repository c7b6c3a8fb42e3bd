"""Where an adapter is saved that must not harm what is there: folders and repositories of models and of LoRAs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText

from emma_adapter import get_adapter, load_adapter
from tests.adapter.test_trainer import PROCESSOR, base_model, copied, logits, patched, same_values, trainer_for
from tests.checkpoints.test_hub import run  # noqa: F401 - a fixture
from tests.support import tiny
from tests.support.budget import some

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.fixture
def base_folder(tmp_path):
    base_model().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def lora_folder(tmp_path):
    model = get_peft_model(base_model(), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "lora")
    return tmp_path / "lora"


def trained():
    model = patched()
    tiny.train_randomly(get_adapter(model).train_only().alignment)
    return model


def assert_base_and_adapter(folder, model):
    base = AutoModelForImageTextToText.from_pretrained(folder)
    assert same_values(base.state_dict(), base_model().state_dict())
    load_adapter(base, folder, processor=PROCESSOR)
    assert torch.equal(logits(base), logits(model))


# ------------------------------------------------------------------------------------------ a model's folder


@pytest.mark.parametrize("by", ["adapter", "Trainer"])
def test_an_adapter_goes_beside_the_model_of_a_folder(by, base_folder, tmp_path):
    before, model = contents(base_folder), trained()
    for _ in range(2):
        if by == "adapter":
            get_adapter(model).save_pretrained(base_folder)
        else:
            trainer_for(model, tmp_path / "run").save_model(str(base_folder))
    after = contents(base_folder)
    assert {path: after[path] for path in before} == before
    assert Path("emma_adapter") / CONFIG in after
    assert_base_and_adapter(base_folder, model)


def test_an_adapter_among_the_files_of_a_model_is_moved(base_folder, tmp_path):
    """An earlier release put it there; loaded and saved again, the model is one again."""
    get_adapter(trained()).save_pretrained(tmp_path / "old")
    for name in (CONFIG, WEIGHTS):
        shutil.copy(tmp_path / "old" / name, base_folder)
    adapter = load_adapter(base_model(), base_folder, processor=PROCESSOR)
    tiny.train_randomly(adapter.alignment, seed=7)
    adapter.save_pretrained(base_folder)
    assert_base_and_adapter(base_folder, adapter.model)


def test_a_config_of_something_else_is_no_model(tmp_path):
    for number, text in enumerate(["{", "[]", '{"name": "site"}']):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "config.json").write_text(text)
        get_adapter(trained()).save_pretrained(folder)
        assert (folder / CONFIG).is_file()


# ------------------------------------------------------------------------------------------ the hub


@pytest.mark.slow
@pytest.mark.nightly
def test_a_repository_that_holds_a_model(run):  # noqa: F811
    run, hub = run
    said = run(
        """
import tempfile
from huggingface_hub import HfApi
from transformers import AutoModelForImageTextToText

def upload(folder, repo):
    HfApi().create_repo(repo)
    HfApi().upload_folder(repo_id=repo, folder_path=folder)

adapter = trained(1)
folder = tempfile.mkdtemp()
tiny.llava().save_pretrained(folder)
upload(folder, "someone/model")
adapter.save_pretrained(folder + "/old")
HfApi().upload_folder(repo_id="someone/model", folder_path=folder + "/old")  # as an earlier release did
adapter.push_to_hub("someone/model")
base = AutoModelForImageTextToText.from_pretrained("someone/model")
assert type(base).__name__ == "LlavaForConditionalGeneration"
assert torch.equal(logits(load_adapter(base, "someone/model").model), logits(adapter.model))

from peft import LoraConfig, get_peft_model
folder = tempfile.mkdtemp()
get_peft_model(tiny.llava(), LoraConfig(target_modules=["q_proj"])).save_pretrained(folder)
upload(folder, "someone/lora")
try:
    adapter.push_to_hub("someone/lora")
except FileExistsError as error:
    print("refused", error)

from tests.adapter.test_trainer import trainer_for
adapter.train_only()
for repository in ("someone/lora", "someone/model"):
    trainer = trainer_for(adapter.model, tempfile.mkdtemp(), push_to_hub=True, hub_model_id=repository)
    try:
        trainer.train()
    except FileExistsError as error:
        print("refused", error, trainer.state.global_step)
"""
    )
    refused = [line for line in said.splitlines() if "refused" in line]
    assert ["someone/lora" in line for line in refused] == [True, True, False]
    assert all(line.endswith(" 0") for line in refused[1:])
    files = hub.branches["someone/model"]["main"][-1]
    assert f"emma_adapter/{CONFIG}" in files
    assert CONFIG not in files
    assert json.loads(hub.branches["someone/lora"]["main"][-1][CONFIG])["peft_type"] == "LORA"


# ------------------------------------------------------------------------------------------ when a Trainer starts


def refused(trainer, match):
    before = copied(trainer.model)
    with pytest.raises(FileExistsError, match=match):
        trainer.train()
    assert trainer.state.global_step == 0
    assert same_values(trainer.model.state_dict(), before)


@pytest.mark.parametrize(("place", "compiled"), some(1, [".", "checkpoint-3", "checkpoint-6"], [False, True]))
def test_a_run_into_the_folder_of_a_lora_is_refused_before_its_first_step(place, compiled, lora_folder, tmp_path):
    shutil.copytree(lora_folder, tmp_path / "run" / place)
    before = contents(tmp_path / "run")
    options = {"torch_compile": True, "torch_compile_backend": "eager"} if compiled else {}
    refused(trainer_for(trained(), tmp_path / "run", **options), "adapter of PEFT")
    assert contents(tmp_path / "run") == before


def test_a_run_whose_checkpoint_is_a_model_is_refused_before_its_first_step(base_folder, tmp_path):
    """As where the base itself comes from an earlier run into the same folder."""
    shutil.copytree(base_folder, tmp_path / "run" / "checkpoint-3")
    refused(trainer_for(trained(), tmp_path / "run"), "holds a whole model")
    with pytest.raises(FileExistsError, match="holds a whole model"):
        trainer_for(trained(), tmp_path / "other").save_model(str(tmp_path / "run" / "checkpoint-3"))


@pytest.mark.parametrize(
    "what", ["beyond the last step", "no checkpoints", "the whole model", "LoRA and EMMA", "again"]
)
def test_runs_that_replace_nothing_of_others_are_not_refused(what, lora_folder, base_folder, tmp_path):
    model, folder, options = trained(), tmp_path / "run", {"max_steps": 2, "save_steps": 1}
    if what == "beyond the last step":
        shutil.copytree(lora_folder, folder / "checkpoint-5")
    elif what == "no checkpoints":
        shutil.copytree(lora_folder, folder / "checkpoint-2")
        options["save_strategy"] = "no"
    elif what == "the whole model":
        shutil.copytree(base_folder, folder / "checkpoint-2")
        get_adapter(model).unfreeze()
    elif what == "LoRA and EMMA":
        shutil.copytree(lora_folder, folder / "checkpoint-2")
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    else:
        trainer_for(model, folder, **options).train()
    trainer = trainer_for(model, folder, **options)
    trainer.train()
    assert trainer.state.global_step == 2


def test_finetune_looks_at_its_output_first(lora_folder):
    from click.testing import CliRunner

    from emma_adapter.cli import main

    done = CliRunner().invoke(
        main, ["finetune", "--model", "no/model", "--data", "no.jsonl", "--output", str(lora_folder)]
    )
    assert done.exit_code != 0
    assert "adapter of PEFT" in done.output + str(done.exception or "")
