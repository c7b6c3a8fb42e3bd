"""Several adapters on one model."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlavaForConditionalGeneration

from emma_adapter import (
    EmmaAdapter,
    EmmaConfig,
    EmmaUnified,
    InstructionError,
    PatchError,
    get_adapter,
    load_adapter,
    patch_model,
    unpatch_model,
)
from tests.support import tiny
from tests.support.zoo import ZOO
from tests.support.zoo.rows import Row

ATTENTION, MODULATION = EmmaConfig(fusion="attention"), EmmaConfig(fusion="modulation", instruction_policy="all_turns")
INPUTS = tiny.token_inputs([1, 2, 0])


@torch.no_grad()
def logits(model, inputs=INPUTS, **more):
    return model(**inputs, **more).logits


def alone(config, seed):
    """A model with one trained adapter."""
    model = tiny.llava()
    torch.manual_seed(seed)
    adapter = patch_model(model, config, processor=tiny.processor())
    tiny.train_randomly(adapter.alignment, seed=seed)
    return model


def both():
    """A model with two trained adapters, the first active, and what each answers when it is alone."""
    model = alone(ATTENTION, 1)
    adapter = get_adapter(model)
    torch.manual_seed(2)
    adapter.add("other", MODULATION).set_active("other")
    tiny.train_randomly(adapter.alignment, seed=2)
    adapter.set_active("default")
    return model, adapter, {"default": logits(alone(ATTENTION, 1)), "other": logits(alone(MODULATION, 2))}


def test_a_new_adapter_changes_nothing_until_it_is_active():
    model = alone(ATTENTION, 1)
    expected = logits(model)
    adapter = get_adapter(model)
    adapter.add("other", MODULATION)
    assert torch.equal(logits(model), expected)
    assert (adapter.names, adapter.active) == (("default", "other"), "default")
    assert adapter.config.fusion == "attention"
    adapter.set_active("other")
    assert adapter.config.fusion == "modulation"
    assert torch.equal(logits(model), logits(tiny.llava()))


def test_each_answers_as_it_does_alone():
    model, adapter, expected = both()
    assert not torch.allclose(expected["default"], expected["other"])
    for name in ("default", "other", "default"):
        assert torch.equal(logits(adapter.set_active(name).model), expected[name])
    with adapter.disabled():
        assert torch.equal(logits(model), logits(tiny.llava()))
    generated = {}
    for name in adapter.names:
        generated[name] = adapter.set_active(name).model.generate(**INPUTS, max_new_tokens=4, do_sample=False)
    assert torch.equal(generated["other"], alone(MODULATION, 2).generate(**INPUTS, max_new_tokens=4, do_sample=False))


def test_each_reads_the_instruction_by_its_own_policy():
    talk = [tiny.user("how many dogs are there?"), tiny.assistant("two"), tiny.user("and cats?", images=0)]
    inputs = tiny.chat_inputs([talk])
    model, adapter, _ = both()
    lengths = []
    for name in ("default", "other"):
        adapter.set_active(name)
        adapter.alignment.register_forward_pre_hook(lambda module, args: lengths.append(args[1].shape[1]))
        logits(model, inputs)
    assert 0 < lengths[0] < lengths[1] / 2


def test_each_has_its_own_instruction_encoder(tmp_path):
    folder = str(tiny.clip_text_folder(tmp_path))
    model, adapter, expected = both()
    adapter.add("clip", EmmaConfig(fusion="linear"), instruction_encoder=folder).set_active("clip")
    tiny.train_randomly(adapter.alignment)
    assert (logits(model, tiny.chat_inputs([[tiny.user("a cat?")]])) != 0).all()
    assert adapter.cache_info().misses == 1
    assert torch.equal(logits(adapter.set_active("other").model), expected["other"])


def test_only_the_active_one_is_trained():
    model, adapter, _ = both()
    adapter.train_only()
    for name in ("other", "default", "other"):
        adapter.set_active(name)
        trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
        assert trained == {id(parameter) for parameter in adapter.parameters()}
        assert sum(len(group["params"]) for group in adapter.parameter_groups(lr=1.0)) == len(trained)
    unpatch_model(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_frozen_adapter_stays_frozen():
    _, adapter, _ = both()
    for parameter in adapter.parameters():
        parameter.requires_grad_(False)
    adapter.set_active("other")
    assert not any(parameter.requires_grad for parameter in adapter.parameters())


def test_the_projector_belongs_to_the_adapter_it_was_trained_with(tmp_path):
    model, adapter, expected = both()
    adapter.train_only(projector=True)
    with torch.no_grad():
        adapter.projector.linear_1.weight.add_(0.1)
    with_projector = logits(model)
    assert not torch.allclose(with_projector, expected["default"])
    adapter.set_active("other")
    assert torch.equal(logits(model), expected["other"])
    assert adapter.projector is None
    model.save_pretrained(tmp_path / "all")
    adapter.set_active("default")
    assert torch.equal(logits(model), with_projector)
    assert adapter.projector.linear_1.weight.requires_grad
    with adapter.disabled():
        assert torch.equal(logits(model), logits(tiny.llava()))
    adapter.set_active("other")

    # Saved while the other one was active: nothing of the projector is lost, or mixed into the base.
    base = LlavaForConditionalGeneration.from_pretrained(tmp_path / "all").eval()
    assert torch.equal(logits(base), logits(tiny.llava()))
    loaded = load_adapter(base, tmp_path / "all" / "emma_adapter", processor=tiny.processor())
    load_adapter(base, tmp_path / "all" / "emma_adapter" / "default", name="first")
    assert torch.equal(logits(base), expected["other"])
    assert torch.equal(logits(loaded.set_active("first").model), with_projector)
    unpatch_model(base)
    assert torch.equal(logits(base), logits(tiny.llava()))


def test_saved_and_loaded_by_name(tmp_path):
    _, adapter, expected = both()
    for name in adapter.names:
        adapter.set_active(name).save_pretrained(tmp_path / name)
    model = tiny.llava()
    loaded = load_adapter(model, tmp_path / "default", processor=tiny.processor())
    load_adapter(model, tmp_path / "other", name="other")
    assert (loaded.active, loaded.names) == ("default", ("default", "other"))
    for name in ("other", "default"):
        assert torch.equal(logits(loaded.set_active(name).model), expected[name])
    # Into one that exists, while it isn't active.
    tiny.train_randomly(loaded.set_active("other").alignment, seed=9)
    loaded.set_active("default")
    load_adapter(model, tmp_path / "other", name="other")
    assert torch.equal(logits(model), expected["default"])
    assert torch.equal(logits(loaded.set_active("other").model), expected["other"])


def test_loading_into_another_kind_says_so(tmp_path):
    model, adapter, expected = both()
    adapter.save_pretrained(tmp_path)
    with pytest.raises(PatchError, match="name="):
        load_adapter(model, tmp_path, name="other")
    assert torch.equal(logits(model), expected["default"])
    with pytest.raises(PatchError, match="first adapter of a model"):
        load_adapter(tiny.llava(), tmp_path, name="other")


def test_bad_names():
    _, adapter, _ = both()
    for call, message in (
        (lambda: adapter.add("other"), "already"),
        (lambda: adapter.add("a.b"), "letters"),
        (lambda: adapter.add(""), "letters"),
        (lambda: adapter.add("default"), "already"),
        (lambda: adapter.set_active("another"), "no adapter 'another'"),
        (lambda: adapter.remove("another"), "no adapter 'another'"),
        (lambda: adapter.remove("default"), "active"),
    ):
        with pytest.raises(PatchError, match=message):
            call()
    assert adapter.names == ("default", "other")


def test_an_adapter_that_cannot_be_built_leaves_the_model_as_it_was():
    model, adapter, expected = both()
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match="instruction_dim"):
        adapter.add("third", EmmaConfig(instruction_dim=7))
    assert adapter.names == ("default", "other")
    assert list(model.state_dict()) == keys
    assert torch.equal(logits(model), expected["default"])


def test_removed_is_gone():
    model, adapter, expected = both()
    adapter.remove("other")
    assert adapter.names == ("default",)
    assert not [name for name in model.state_dict() if "emma_other" in name]
    assert torch.equal(logits(model), expected["default"])
    adapter.add("other", ATTENTION)


def test_unpatching_takes_all_of_them():
    model, _, _ = both()
    unpatch_model(model)
    assert torch.equal(logits(model), logits(tiny.llava()))
    assert list(model.state_dict()) == list(tiny.llava().state_dict())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_them_too(copied):
    model, adapter, expected = both()
    twin = get_adapter(copied(model))
    twin.set_active("other")
    tiny.train_randomly(adapter.alignment, seed=5)
    assert adapter.active == "default"
    assert torch.equal(logits(twin.model), expected["other"])
    assert torch.equal(logits(twin.set_active("default").model), expected["default"])


def test_an_instruction_is_for_the_adapter_that_was_active():
    _, adapter, expected = both()
    with adapter.instruction("is there a cat?"):
        adapter.set_active("other")
        with pytest.raises(InstructionError, match="call set_adapter"):
            logits(adapter.model)
    assert torch.equal(logits(adapter.model), expected["other"])


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputed_projector_uses_the_adapter_of_its_call(reentrant):
    """Another one may be active by then."""

    class Checkpointed(nn.Module):
        def __init__(self, projector):
            super().__init__()
            self.projector = projector

        def forward(self, x):
            return checkpoint(self.projector, x.requires_grad_(), use_reentrant=reentrant)

    def gradients(switch):
        model, _, _ = both()
        if switch:
            model.model.multi_modal_projector = Checkpointed(model.model.multi_modal_projector)
        loss = model(**INPUTS).logits.square().mean()
        parameters = list(model.get_submodule("model.multi_modal_projector").parameters())
        if switch:
            # Not set_active(), which would freeze what the backward is for.
            model._emma.active = "other"
        loss.backward()
        return [parameter.grad for parameter in parameters]

    plain, recomputed = gradients(False), gradients(True)
    assert sum(gradient is not None for gradient in plain) > 4
    for expected, found in zip(plain, recomputed, strict=True):
        assert (expected is None) == (found is None)
        assert expected is None or torch.equal(expected, found)


def test_deepstack_projectors_of_one_adapter_only():
    entry = ZOO["qwen3_vl"]
    model = entry.model()
    inputs = entry.batch([Row(("is there a cat?",), images=((56, 56),)), Row(("how many?",), images=((28, 84),))])
    before = logits(model, inputs)
    adapter = patch_model(model)
    tiny.train_randomly(adapter.alignment)
    main_only = logits(model, inputs)
    adapter.add("deep", EmmaConfig(align_deepstack=True)).set_active("deep")
    assert torch.equal(logits(model, inputs), before)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    deep = logits(model, inputs)
    assert torch.equal(logits(adapter.set_active("default").model, inputs), main_only)
    assert torch.equal(logits(adapter.set_active("deep").model, inputs), deep)
    adapter.set_active("default").remove("deep")
    assert torch.equal(logits(model, inputs), main_only)
    unpatch_model(model)
    assert torch.equal(logits(model, inputs), before)


def test_deepstack_projectors_that_only_the_last_adapter_trained_are_frozen_with_it():
    """Trained by nobody's adapter, they would be saved with none."""
    model = ZOO["qwen3_vl"].model()
    adapter = patch_model(model, EmmaConfig(align_deepstack=True), processor=ZOO["qwen3_vl"].processor())
    adapter.train_only(projector=True)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad and "projector" in name}
    assert any("deepstack" in name for name in trained)
    adapter.add("other", EmmaConfig()).set_active("other")
    assert not {name for name, parameter in model.named_parameters() if parameter.requires_grad} & trained
    adapter.set_active("default")
    assert {n for n, p in model.named_parameters() if p.requires_grad and "projector" in n} == trained


def test_the_names_of_earlier_releases_mean_the_same():
    for handle in (EmmaAdapter, EmmaUnified):
        now = (handle.add_adapter, handle.set_adapter, handle.disable_adapter, handle.active_adapter)
        assert (handle.add, handle.set_active, handle.disabled, handle.active) == now
    assert EmmaAdapter.remove is EmmaAdapter.delete_adapter
