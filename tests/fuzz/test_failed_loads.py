"""A load that fails late, when the files were found right, leaves the model as it was too."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from emma_adapter import (
    CheckpointError,
    ConfigError,
    EmmaConfig,
    EncoderError,
    PatchError,
    get_adapter,
    load_adapter,
    patch_model,
    register_fusion,
    unpatch_model,
)
from emma_adapter.adapter import named_adapters, patch, restoring
from emma_adapter.alignment.fusion import registry
from emma_adapter.patching import projectors, sites
from tests.fuzz.victims import FUSIONS, fingerprint, logits, patched
from tests.support import tiny
from tests.support.budget import some

ATTENTION = FUSIONS["attention"]


class Letters(nn.Module):
    """An instruction encoder of the user's own."""

    instruction_dim, max_instruction_tokens = 12, 6

    def forward(self, texts):
        codes = torch.tensor([[ord(letter) for letter in text[:6].ljust(6)] for text in texts])
        return torch.sin(codes[..., None] * torch.arange(1, 13) / 7), torch.ones_like(codes, dtype=torch.bool)


@pytest.fixture
def _own_fusion(monkeypatch):
    monkeypatch.setattr(registry, "FUSIONS", dict(registry.FUSIONS))
    register_fusion("test-buffered")(tiny.BufferedFusion)


@pytest.fixture
def folder(tmp_path):
    """An adapter, and the projector that was trained with it."""
    get_adapter(patched(projector=True, seed=3)).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def several():
    """A model with two adapters, the first active and trained with its projector."""
    model = patched(projector=True, seed=5)
    adapter = get_adapter(model)
    adapter.add("second", FUSIONS["modulation"])
    adapter.add("third", ATTENTION)
    return model


MODELS = {"unpatched": tiny.llava, "patched": patched, "trained": lambda: patched(projector=True), "several": several}


def refused(model, folder, error, match=None, **options):
    logits(model)
    before, said = fingerprint(model), logits(model)
    with pytest.raises(error, match=match):
        load_adapter(model, folder, **options)
    assert fingerprint(model) == before
    assert torch.equal(logits(model), said)


class Stopped(BaseException):
    """As a KeyboardInterrupt: not to be caught as an error."""


STEPS = [
    (restoring, "assign"),
    (projectors, "assign"),
    (projectors, "give_own_projectors"),
    (restoring, "make_pipeline"),
    (named_adapters, "make_pipeline"),
    (named_adapters, "attach"),
    (named_adapters, "make_alignments"),
    (sites, "attach"),
    (patch, "install_call_hooks"),
    (torch.Tensor, "copy_"),
]
#: Model, and name of the adapter that is loaded into.
CASES = [("unpatched", None), ("patched", None), ("patched", "new"), ("trained", None)]
CASES += [("several", None), ("several", "third"), ("several", "new")]


@pytest.mark.parametrize(
    ("step", "after"), some(1, STEPS, [False, True]), ids=lambda value: value if isinstance(value, bool) else value[1]
)
def test_interrupted_at_any_step(step, after, folder, monkeypatch):
    """At each step of loading, before it is done the first time, and after; where it is done several times, that is in
    the middle."""
    holder, function = step
    original, stopped = getattr(holder, function), 0

    def failing(*args, **kwargs):
        if after:
            original(*args, **kwargs)
        raise Stopped

    for kind, name in CASES:
        model = MODELS[kind]()
        logits(model)
        before, said = fingerprint(model), logits(model)
        with monkeypatch.context() as patch:
            patch.setattr(holder, function, failing)
            try:
                load_adapter(model, folder, name=name)
            except Stopped:
                stopped += 1
            else:
                continue
        assert fingerprint(model) == before, (kind, name)
        assert torch.equal(logits(model), said), (kind, name)
        # And then it can be loaded.
        load_adapter(model, folder, name=name)
    assert stopped


def test_an_encoder_that_cannot_be_loaded_comes_before_the_kernel(folder):
    """The kernel was changed first, and stayed changed."""
    model = patch_model(tiny.llava(), ATTENTION, processor=tiny.processor(), instruction_encoder=Letters()).model
    get_adapter(model).save_pretrained(folder)
    inputs = tiny.chat_inputs([[tiny.user("how many dogs?")]])
    with torch.no_grad():
        said = model(**inputs).logits
    before = fingerprint(model)
    options = {"processor": tiny.processor(), "kernel": "eager"}
    for encoder, error in (("/no/such/folder", EncoderError), (nn.Linear(1, 1), EncoderError)):
        with pytest.raises(error):
            load_adapter(model, folder, instruction_encoder=encoder, **options)
        assert fingerprint(model) == before
    other = Letters()
    other.instruction_dim = 16
    with pytest.raises(ConfigError, match="instruction_dim"):
        load_adapter(model, folder, instruction_encoder=other, **options)
    assert fingerprint(model) == before
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, said)
    load_adapter(model, folder, instruction_encoder=Letters(), **options)
    assert get_adapter(model).config.kernel == "eager"


def test_an_encoder_that_cannot_be_loaded_leaves_no_new_adapter(folder, tmp_path):
    saved = patch_model(tiny.llava(), ATTENTION, processor=tiny.processor(), instruction_encoder=Letters())
    saved.save_pretrained(tmp_path / "with encoder")
    for victim, name in ((tiny.llava(), None), (patched(), "new"), (several(), "new")):
        refused(victim, tmp_path / "with encoder", EncoderError, name=name, processor=tiny.processor())
        wrong = Letters()
        wrong.max_instruction_tokens = 3
        refused(
            victim,
            tmp_path / "with encoder",
            ConfigError,
            name=name,
            processor=tiny.processor(),
            instruction_encoder=wrong,
        )


@pytest.mark.usefixtures("_own_fusion")
@pytest.mark.parametrize("patched_before", [False, True])
def test_a_fusion_without_the_kernel_that_is_asked_for(patched_before, tmp_path):
    config = EmmaConfig(fusion="test-buffered")
    get_adapter(patched(config)).save_pretrained(tmp_path / "saved")
    model = patched(config, seed=4) if patched_before else tiny.llava()
    refused(model, tmp_path / "saved", ConfigError, match="no Triton kernel", kernel="triton")
    if patched_before:
        refused(model, tmp_path / "saved", ConfigError, match="no Triton kernel", kernel="triton", name="new")


@pytest.mark.usefixtures("_own_fusion")
def test_integer_buffers_of_a_fusion_are_loaded(tmp_path):
    """As BatchNorm has one. They were saved, and refused when they were to be loaded."""

    @register_fusion("test-counting")
    class Counting(tiny.BufferedFusion):
        def __init__(self, config):
            super().__init__(config)
            self.register_buffer("seen", torch.tensor(0))

    config = EmmaConfig(fusion="test-counting")
    model = patched(config)
    get_adapter(model).alignment.fusion.seen.fill_(7)
    get_adapter(model).save_pretrained(tmp_path)
    assert load_adapter(tiny.llava(), tmp_path).alignment.fusion.seen == 7
    get_adapter(model).alignment.fusion.seen = torch.tensor(7, dtype=torch.int32)
    get_adapter(model).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"seen is torch\.int32 and should be torch\.int64"):
        load_adapter(tiny.llava(), tmp_path)


@pytest.mark.parametrize("name", ["not a name", "a.b", "", "1x", "\n", "default"])
def test_names_that_cannot_be(name, folder):
    if name == "default":
        refused(patched(FUSIONS["linear"]), folder, PatchError, name=name)
    elif name:
        refused(patched(), folder, PatchError, match="name of an adapter", name=name)
    refused(tiny.llava(), folder, PatchError, name="other")


def test_loading_into_another_adapter_never_makes_it_the_active_one(folder, monkeypatch):
    """Not even meanwhile: other threads may be in the middle of a call."""
    model = several()
    adapter, said = get_adapter(model), logits(model)
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    values = {name: value.clone() for name, value in model.state_dict().items()}
    assign, seen = projectors.assign, []

    def watched(*args):
        seen.append((adapter.active, torch.equal(logits(model), said)))
        assign(*args)
        seen.append((adapter.active, torch.equal(logits(model), said)))

    monkeypatch.setattr(projectors, "assign", watched)
    monkeypatch.setattr(named_adapters, "activate", None)
    for name in ("new", "third", "new"):
        load_adapter(model, folder, name=name)
    monkeypatch.undo()
    assert seen == [("default", True)] * 6
    assert all(parameter.requires_grad == before for parameter, before in trainable)
    own = {key: value for key, value in model.state_dict().items() if "emma_third" not in key}
    assert all(torch.equal(own[key], values[key]) for key in own if key in values)
    expected = tiny.llava()
    load_adapter(expected, folder)
    for name in ("third", "new"):
        adapter.set_active(name)
        assert torch.equal(logits(model), logits(expected))
        with adapter.disabled():
            assert torch.equal(logits(model), logits(tiny.llava()))
    adapter.set_active("default")
    assert torch.equal(logits(model), said)


def test_a_projector_that_was_put_by_is_saved_and_gives_way(folder, tmp_path):
    """The one that was loaded into an adapter which isn't active."""
    model = several()
    get_adapter(patched(projector=True, seed=8)).save_pretrained(tmp_path / "other")
    load_adapter(model, tmp_path / "other", name="third")
    load_adapter(model, folder, name="third")
    adapter = get_adapter(model).set_active("third")
    adapter.save_pretrained(tmp_path / "again")
    expected, again = tiny.llava(), tiny.llava()
    load_adapter(expected, folder)
    load_adapter(again, tmp_path / "again")
    assert torch.equal(logits(model), logits(expected))
    assert torch.equal(logits(again), logits(expected))
    unpatch_model(model)
    assert torch.equal(logits(model), logits(tiny.llava()))
