"""Several branches on one model: each draws, learns and is saved as it does alone, and the base answers as ever."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from emma_adapter import (
    CheckpointError,
    PatchError,
    UnifiedConfig,
    get_adapter,
    load_unified,
    patch_model,
    unify_model,
    unpatch_model,
)
from emma_adapter.unified.checkpoint import CONFIG_NAME, WEIGHTS_NAME
from tests.support.tiny import train_randomly
from tests.support.zoo import ZOO
from tests.unified.small import autoencoder, drawn, picture, seeded, unified

ENTRY = ZOO["qwen3_vl"]
CONFIGS = {"default": UnifiedConfig(decoupling=2, shared_layers=1), "comics": UnifiedConfig(decoupling="full")}


def alone(name):
    return unified("qwen3_vl", CONFIGS[name], trained=False), {"default": 1, "comics": 2}[name]


def trained(name):
    adapter, seed = alone(name)
    train_randomly(adapter.model.emma_unified, 0.05, seed=seed)
    return adapter


def both():
    """The two on one model, with the weights that ``trained`` gives each."""
    adapter, _ = alone("default")
    adapter.add("comics", CONFIGS["comics"])
    for name in CONFIGS:
        getattr(adapter.model.emma_unified, name).load_state_dict(trained(name).model.emma_unified.default.state_dict())
    return adapter


def picture_of(adapter):
    return drawn(adapter, "a cat", picture(1), generator=seeded(0))


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def pictures():
    return {name: picture_of(trained(name)) for name in CONFIGS}


def test_each_draws_as_it_does_alone(pictures):
    adapter = both()
    assert (adapter.names, adapter.active) == (("default", "comics"), "default")
    for name in ("default", "comics", "default"):
        assert adapter.set_active(name).config.decoupling == CONFIGS[name].decoupling
        assert torch.equal(picture_of(adapter), pictures[name])
    assert not torch.equal(pictures["default"], pictures["comics"])
    assert "active='default' of ['default', 'comics']" in repr(adapter)


def test_a_new_one_changes_nothing_until_it_is_active(pictures):
    adapter = trained("default")
    before = weights(adapter.model)
    adapter.add("comics", CONFIGS["comics"])
    assert torch.equal(picture_of(adapter), pictures["default"])
    adapter.remove("comics")
    after = weights(adapter.model)
    assert list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("frozen", [False, True])
def test_only_the_active_one_is_trained(frozen):
    adapter = both().train_only()
    if frozen:
        adapter.model.requires_grad_(False)
    before = weights(adapter.model)
    adapter.set_active("comics")
    trainable = {name for name, p in adapter.model.named_parameters() if p.requires_grad}
    assert trainable == (set() if frozen else {f"emma_unified.comics.{name}" for name, _ in adapter.named_parameters()})
    if frozen:
        return
    optimizer = torch.optim.SGD(adapter.parameter_groups(lr=0.1))
    adapter.loss(["a cat"], torch.rand(1, 3, 64, 64), [picture(2)], generator=seeded(1)).backward()
    optimizer.step()
    changed = {name for name, value in adapter.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith("emma_unified.comics.") for name in changed)
    adapter.unfreeze()
    trainable = {
        name.split(".")[1] for name, p in adapter.model.named_parameters() if p.requires_grad and "emma" in name
    }
    assert trainable == {"comics"}


def test_saved_and_loaded_by_name(tmp_path, pictures):
    adapter = both()
    adapter.model.save_pretrained(tmp_path)
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("unified_*")}
    names = (CONFIG_NAME, WEIGHTS_NAME)
    assert files == {*names, *(f"emma_unified/comics/{name}" for name in names)}
    base = type(adapter.model).from_pretrained(tmp_path)
    assert not any(name.startswith("emma") for name in base.state_dict())
    again = load_unified(base, tmp_path, processor=ENTRY.processor(), autoencoder=autoencoder())
    # The same autoencoder is not loaded twice.
    load_unified(base, tmp_path, subfolder="emma_unified/comics", name="comics")
    assert again.active == "default"
    for name in CONFIGS:
        assert torch.equal(picture_of(again.set_active(name)), pictures[name])
        assert again.autoencoder is autoencoder()
    again.save_pretrained(tmp_path / "active")
    one = load_unified(ENTRY.model(), tmp_path / "active", processor=ENTRY.processor(), autoencoder=autoencoder())
    assert torch.equal(picture_of(one), pictures["comics"])


def test_another_autoencoder_of_the_same_config_is_not_taken_for_its_own(tmp_path):
    """Only weights may differ, of which the file tells nothing but where they are from."""
    for name in ("one", "other"):
        autoencoder().save_pretrained(tmp_path / name)
        made = unify_model(
            ENTRY.model(), CONFIGS["default"], processor=ENTRY.processor(), autoencoder=str(tmp_path / name)
        )
        made.save_pretrained(tmp_path / f"saved {name}")
    adapter = load_unified(ENTRY.model(), tmp_path / "saved one", processor=ENTRY.processor())
    own = adapter.autoencoder
    for name in ("one", "other"):
        load_unified(adapter.model, tmp_path / f"saved {name}", name=name)
    assert adapter.set_active("one").autoencoder is own
    assert adapter.set_active("other").autoencoder is not own


def test_a_damaged_one_is_not_added(tmp_path, pictures):
    trained("comics").save_pretrained(tmp_path)
    content = bytearray((tmp_path / WEIGHTS_NAME).read_bytes())
    content[-1] ^= 1
    (tmp_path / WEIGHTS_NAME).write_bytes(content)
    adapter = trained("default")
    names = list(adapter.model.state_dict())
    with pytest.raises(CheckpointError, match=r"SHA-256|NaN"):
        load_unified(adapter.model, tmp_path, name="comics")
    assert list(adapter.model.state_dict()) == names and adapter.names == ("default",)
    assert torch.equal(picture_of(adapter), pictures["default"])


def test_training_the_second_goes_on_from_a_checkpoint(tmp_path):
    def trainer(adapter, steps):
        rows = [{"prompt": "a cat", "image": picture(1), "target": picture(2)}] * 4
        arguments = TrainingArguments(
            str(tmp_path), max_steps=steps, save_steps=2, per_device_train_batch_size=2, learning_rate=0.01,
            remove_unused_columns=False, label_names=["target_pixel_values"], report_to=[], use_cpu=True,
            disable_tqdm=True,
        )  # fmt: skip
        collator = adapter.collator(size=(64, 64))
        return Trainer(adapter.model, arguments, data_collator=collator, train_dataset=rows)

    whole = both().set_active("comics").train_only()
    trainer(whole, 4).train()
    part = both().set_active("comics").train_only()
    trainer(part, 4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    wanted, found = weights(whole.model), weights(part.model)
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert not torch.equal(
        found["emma_unified.comics.latents.weight"], weights(both().model)["emma_unified.comics.latents.weight"]
    )
    saved = load_file(tmp_path / "checkpoint-4" / WEIGHTS_NAME)
    assert all(torch.equal(saved[name], value) for name, value in whole.named_parameters())


@pytest.mark.parametrize("name", ["default", "comics", "not a name", "keys", "train", "", 3])
def test_bad_names(name):
    adapter = both()
    with pytest.raises(PatchError, match="name"):
        adapter.add(name)
    assert adapter.names == ("default", "comics")
    if name not in CONFIGS:
        with pytest.raises(PatchError, match="no branch"):
            adapter.set_active(name)
        with pytest.raises(PatchError, match="no branch"):
            adapter.remove(name)


def test_what_cannot_be_added_or_taken_off(tmp_path):
    adapter = both()
    adapter.save_pretrained(tmp_path)
    with pytest.raises(PatchError, match="active branch"):
        adapter.remove("default")
    with pytest.raises(PatchError, match="name="):
        load_unified(adapter.model, tmp_path)
    with pytest.raises(PatchError, match="a branch 'comics' already"):
        load_unified(adapter.model, tmp_path, name="comics")
    with pytest.raises(PatchError, match="'default'"):
        load_unified(ENTRY.model(), tmp_path, name="comics", processor=ENTRY.processor(), autoencoder=autoencoder())
    assert adapter.names == ("default", "comics")


def test_copies_have_them_too_and_unpatching_takes_all_of_them(pictures):
    adapter = both()
    patch_model(adapter.model)
    twin = copy.deepcopy(adapter).set_active("comics")
    train_randomly(adapter.model.emma_unified, 0.05, seed=9)
    assert torch.equal(picture_of(twin), pictures["comics"])
    assert adapter.active == "default"
    get_adapter(twin.model)
    unpatch_model(twin.model)
    assert list(twin.model.state_dict()) == list(ENTRY.model().state_dict())
