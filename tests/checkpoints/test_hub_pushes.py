"""What transformers, PEFT and Trainer push of a patched model to a hub that runs here: all of it, and loadable."""

from __future__ import annotations

import itertools

import pytest

from tests.checkpoints.test_hub import run  # noqa: F401 - a fixture

_COMMON = """
import sys, tempfile
from transformers import LlavaForConditionalGeneration
from emma_adapter import unpatch_model

def same(model, expected):
    torch.testing.assert_close(logits(model.eval()), expected, atol=1e-5, rtol=0)
"""
_LORA = """
from peft import LoraConfig, PeftModel, get_peft_model

def lora(adapter):
    torch.manual_seed(5)
    return get_peft_model(adapter.model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
"""


def test_pushed_by_the_model(run):  # noqa: F811
    run, hub = run
    run(
        _COMMON
        + """
adapter = trained(1)
adapter.add("other", EmmaConfig(fusion="attention"))
expected = logits(adapter.model)
adapter.model.push_to_hub("someone/two")
adapter.model.push_to_hub("someone/two", revision="later", commit_message="Say it")
adapter.model.save_pretrained(tempfile.mkdtemp(), push_to_hub=True, repo_id="someone/saved")
for repository in ("someone/two", "someone/saved"):
    base = LlavaForConditionalGeneration.from_pretrained(repository).eval()
    found = load_adapter(base, repository)
    same(found.model, expected)
    load_adapter(base, repository, subfolder="emma_adapter/other", name="other")
    assert found.set_active("other").config.fusion == "attention"
"""
    )
    for repository in ("someone/two", "someone/saved"):
        # One commit, as of an unpatched model.
        _, files = hub.branches[repository]["main"]
        assert {"model.safetensors", "emma_adapter/adapter_config.json", "emma_adapter/other/README.md"} <= set(files)
        card = files["README.md"].decode()
        assert f'load_adapter(model, "{repository}", processor=processor)' in card
        assert "PeftModel" not in card
    assert len(hub.branches["someone/two"]["later"]) == 2


@pytest.mark.nightly
def test_pushed_by_a_lora(run):  # noqa: F811
    run, hub = run
    run(
        _COMMON
        + _LORA
        + """
both = lora(trained(1))
expected = logits(both)
both.push_to_hub("someone/both")
both.push_to_hub("someone/both")
base = tiny.llava()
load_adapter(base, "someone/both")
same(PeftModel.from_pretrained(base, "someone/both"), expected)
# Into a model that is patched, both come at once, as from a folder.
base = tiny.llava()
patch_model(base)
same(PeftModel.from_pretrained(base, "someone/both"), expected)
"""
    )
    files = hub.branches["someone/both"]["main"][-1]
    assert {"adapter_config.json", "adapter_model.safetensors", "emma_adapter/default/adapter_config.json"} <= set(
        files
    )
    card = files["README.md"].decode()
    assert card.count('load_adapter(model, "someone/both", processor=processor)') == 1
    assert 'PeftModel.from_pretrained(model, "someone/both")' in card


KINDS = ("lora", "alone", "everything")
#: Trainer's strategies, and where a checkpoint is with each.
STRATEGIES = {"every_save": None, "checkpoint": "last-checkpoint", "all_checkpoints": "checkpoint-2", "end": None}


@pytest.mark.slow
@pytest.mark.nightly
def test_pushed_by_trainer(run):  # noqa: F811
    run, hub = run
    said = run(
        _COMMON
        + _LORA
        + f"kinds, strategies = {KINDS}, {STRATEGIES}\n"
        + """
first = trained(1)
# It is known that Trainer pushes, also where its code is loaded only after the model was patched.
assert "transformers.trainer" not in sys.modules
from transformers import Trainer, TrainingArguments
from tests.adapter.test_peft import Repeated, collate

def trained_by_trainer(kind, strategy):
    adapter = trained(1)
    model = lora(adapter) if kind == "lora" else adapter.model
    if kind == "alone":
        adapter.train_only()
    arguments = TrainingArguments(
        tempfile.mkdtemp(), max_steps=2, save_steps=1, learning_rate=1e-3, use_cpu=True, report_to=[],
        disable_tqdm=True, per_device_train_batch_size=2, push_to_hub=True, hub_model_id=f"{kind}/{strategy}",
        hub_strategy=strategy, hub_always_push=True,
    )
    trainer = Trainer(model, arguments, train_dataset=Repeated(), data_collator=collate)
    trainer.train()
    if strategy == "end":
        trainer.push_to_hub()
    return model.eval()

def loaded(kind, repository, **subfolder):
    base = tiny.llava()
    if kind == "everything":
        # Trainer's own file holds the model under the names of the running one.
        patch_model(base)
        base.load_state_dict(model.state_dict())
        unpatch_model(base)
    load_adapter(base, repository, **subfolder)
    return PeftModel.from_pretrained(base, repository, **subfolder) if kind == "lora" else base

for kind in kinds:
    for strategy, checkpoint in strategies.items():
        model = trained_by_trainer(kind, strategy)
        expected = logits(model)
        same(loaded(kind, f"{kind}/{strategy}"), expected)
        if checkpoint is not None:
            same(loaded(kind, f"{kind}/{strategy}", subfolder=checkpoint), expected)
        print("loaded", kind, strategy)
"""
    )
    pushed = list(itertools.product(KINDS, STRATEGIES))
    assert [tuple(line.split()[1:]) for line in said.splitlines() if line.startswith("loaded")] == pushed
    for strategy in STRATEGIES:
        files = hub.branches[f"lora/{strategy}"]["main"][-1]
        assert "emma_adapter/default/adapter_model.safetensors" in files
        assert "load_adapter(" in files["README.md"].decode()
