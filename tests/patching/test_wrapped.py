"""Models that other tools have wrapped, copied or share parts of, and patches made in unusual surroundings."""

from __future__ import annotations

import contextlib
import copy
import subprocess
import sys
import warnings

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from emma_adapter import (
    EmmaConfig,
    PatchError,
    block_order,
    get_adapter,
    load_adapter,
    patch_model,
    unpatch_model,
    window_order,
)
from tests.support import tiny
from tests.support.life import leftovers
from tests.support.zoo import ZOO
from tests.support.zoo.rows import Row

INPUTS = tiny.chat_inputs([[tiny.user("how many dogs?")], [tiny.user("is there a cat?")]])


def logits(model, inputs=INPUTS):
    with torch.no_grad():
        return model(**inputs).logits


def trained(model, seed=0, **settings):
    torch.manual_seed(seed)
    adapter = patch_model(model, processor=tiny.processor(), **settings)
    tiny.train_randomly(adapter.alignment, seed=seed)
    return adapter


# ------------------------------------------------------------------------------------------------ wrappers

WRAPPERS = {
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "DataParallel": nn.DataParallel,
    "AveragedModel": AveragedModel,
    "EMA": lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True),
    "accelerate": lambda model: Accelerator(cpu=True).prepare(model),
    "LoRA": lambda model: get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])),
    "a compiled LoRA": lambda model: torch.compile(WRAPPERS["LoRA"](model), backend="eager"),
    "an average of a LoRA": lambda model: AveragedModel(WRAPPERS["LoRA"](model)),
    "two": lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_adapter_is_found_in_what_a_tool_makes_of_the_model(wrapper):
    model = tiny.llava()
    original = logits(model)
    adapter = trained(model)
    wrapped = WRAPPERS[wrapper](model)
    found = get_adapter(wrapped)
    assert type(found.model) is type(model)
    same = found.model is model
    assert same is ("verage" not in wrapper and wrapper != "EMA")
    for name, parameter in found.named_parameters():
        assert torch.equal(parameter, dict(adapter.named_parameters())[name])
    unpatch_model(wrapped)
    assert leftovers(found.model) == []
    assert torch.equal(logits(found.model), original)


def test_an_average_follows_the_adapter():
    model = tiny.llava()
    adapter = trained(model)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    first = {name: value.clone() for name, value in adapter.named_parameters()}
    average.update_parameters(model)
    tiny.train_randomly(adapter.alignment, seed=1)
    average.update_parameters(model)
    for name, value in get_adapter(average).named_parameters():
        assert torch.allclose(value, (first[name] + dict(adapter.named_parameters())[name]) / 2)
    assert not torch.equal(logits(average), logits(model))


def test_what_torch_compile_returned_can_be_patched(tmp_path):
    model = tiny.llava()
    run = torch.compile(model, backend="eager")
    adapter = trained(run)
    assert adapter.model is model
    assert torch.equal(run.generate(**INPUTS, max_new_tokens=2), model.generate(**INPUTS, max_new_tokens=2))
    run.save_pretrained(tmp_path)
    assert (tmp_path / "emma_adapter" / "adapter_model.safetensors").exists()
    assert leftovers(run) != []
    unpatch_model(run)
    assert leftovers(run) == []
    load_adapter(torch.compile(get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))), tmp_path)


def test_an_average_made_before_the_adapter_would_not_know_it():
    with pytest.raises(PatchError, match="AveragedModel"):
        patch_model(torch.compile(AveragedModel(tiny.llava())))


# -------------------------------------------------------------------------------------------- torch.compile


@pytest.fixture
def _compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


REGIONS = {
    "vision tower": lambda model: [model.model.vision_tower],
    "projector": lambda model: [model.model.multi_modal_projector],
    "layers": lambda model: list(model.model.language_model.layers),
}


@pytest.mark.slow
@pytest.mark.usefixtures("_compiler")
@pytest.mark.nightly
@pytest.mark.parametrize("how", ["the whole", "regions"])
def test_a_model_that_ran_compiled_sees_what_comes_after(how, tmp_path):
    model, twin = tiny.llava(), tiny.llava()
    if how == "regions":
        for parts in REGIONS.values():
            for part in parts(model):
                part.compile(backend="eager")
    else:
        model.compile(backend="eager")
    assert torch.equal(logits(model), logits(twin))
    one, other = trained(model), trained(twin)
    assert torch.equal(logits(model), logits(twin))
    if how == "regions":
        for adapter in (one, other):
            adapter.save_pretrained(tmp_path / "saved")
            torch.manual_seed(1)
            adapter.add("second", EmmaConfig(fusion="linear"))
            adapter.set_active("second").train_only(projector=True)
            tiny.train_randomly(adapter.alignment)
            tiny.train_randomly(adapter.projector.linear_1)
        assert torch.allclose(logits(model), logits(twin), atol=1e-6)
        with one.disabled(), other.disabled():
            assert torch.allclose(logits(model), logits(twin), atol=1e-6)
        for adapter in (one, other):
            load_adapter(adapter.model, tmp_path / "saved", name="third")
            adapter.set_active("third")
        assert torch.allclose(logits(model), logits(twin), atol=1e-6)
    unpatch_model(model)
    assert torch.equal(logits(model), logits(tiny.llava()))


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.usefixtures("_compiler")
def test_an_internvl_that_ran_compiled_sees_the_adapter():
    entry = ZOO["internvl"]
    inputs = entry.batch([Row(images=((56, 56),))])
    model, twin = entry.model(), entry.model()
    run = torch.compile(model, backend="eager")
    logits(run, inputs)
    for one in (model, twin):
        torch.manual_seed(0)
        tiny.train_randomly(patch_model(one, processor=entry.processor()).alignment)
    assert torch.equal(logits(run, inputs), logits(twin, inputs))


@pytest.mark.usefixtures("_compiler")
def test_what_was_compiled_is_kept_where_nothing_is_patched():
    double = torch.compile(lambda x: x * 2, backend="eager", fullgraph=True)
    double(torch.ones(2))
    model = tiny.llava()
    with torch._dynamo.config.patch(error_on_recompile=True):
        logits(model)
        double(torch.ones(2))
    seen = torch._dynamo.convert_frame.output_codes.seen
    assert seen
    patch_model(model)
    assert not seen


@pytest.mark.usefixtures("_compiler")
def test_compiling_a_qwen_warns_of_nothing_of_ours():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = torch.compile(lambda x: x + window_order((4, 4), 2, 1), backend="eager")(torch.zeros(16))
    assert torch.equal(found, window_order((4, 4), 2, 1).float())
    assert block_order((4, 4), 2) is block_order((4, 4), 2)


@pytest.mark.slow
@pytest.mark.nightly
def test_python_ends_quietly_after_a_patched_model_was_compiled():
    """What was compiled holds the model until the names of this library's modules are gone."""
    code = (
        "import torch, emma_adapter\n"
        "from tests.support import tiny\n"
        "model = tiny.llava()\n"
        "emma_adapter.patch_model(model, processor=tiny.processor())\n"
        "with torch.no_grad():\n"
        "    torch.compile(model, backend='eager')(**tiny.chat_inputs([[tiny.user('how many dogs?')]]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Exception ignored" not in done.stderr


# ------------------------------------------------------------------------------------------------- sharing


def share_inner(one, other):
    other.model = one.model


def share_projector(one, other):
    other.model.multi_modal_projector = one.model.multi_modal_projector


@pytest.mark.parametrize("share", [share_inner, share_projector])
def test_a_model_that_shares_where_the_adapter_sits_is_refused(share):
    one, other = tiny.llava(), tiny.llava(seed=1)
    share(one, other)
    adapter = trained(one)
    expected, before = logits(one), dict(vars(other))
    with pytest.raises(PatchError, match="shares its"):
        patch_model(other)
    assert vars(other) == before
    assert torch.equal(logits(one), expected)
    assert get_adapter(one).active == adapter.active
    unpatch_model(one)
    patch_model(other)


def test_a_deepstack_projector_that_is_shared_is_refused():
    one, other = ZOO["qwen3_vl"].model(), ZOO["qwen3_vl"].model()
    other.model.visual.deepstack_merger_list = one.model.visual.deepstack_merger_list
    patch_model(one, EmmaConfig(align_deepstack=True))
    with pytest.raises(PatchError, match="shares its"):
        patch_model(other)
    unpatch_model(one)
    patch_model(one)
    adapter = patch_model(other, EmmaConfig(align_deepstack=True))
    with pytest.raises(PatchError, match="shares its"):
        get_adapter(one).add("deep", EmmaConfig(align_deepstack=True))
    assert adapter.names == ("default",)
    assert get_adapter(one).names == ("default",)


@pytest.mark.parametrize("part", ["vision_tower", "language_model"])
def test_models_may_share_what_the_adapter_does_not_sit_at(part):
    one, other = tiny.llava(), tiny.llava(seed=1)
    setattr(other.model, part, getattr(one.model, part))
    alone = copy.deepcopy(other)
    adapters = [trained(model, seed) for model, seed in ((one, 0), (other, 1), (alone, 1))]
    text = tiny.chat_inputs([[tiny.user("is there a cat?", images=0)]])
    for model, adapter in zip((one, other, alone), adapters, strict=True):
        # Without images the adapter is tied to the embeddings, and gets gradients of zero.
        model.train()(**text, labels=text["input_ids"]).loss.backward()
        assert all(p.grad is not None and not p.grad.any() for p in adapter.parameters())
        model.eval()
    assert torch.equal(logits(other), logits(alone))
    unpatch_model(one)
    assert torch.equal(logits(other), logits(alone))


# -------------------------------------------------------------------------------------------- surroundings


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SURROUNDINGS = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "meta": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("around", SURROUNDINGS)
def test_an_adapter_is_the_same_wherever_it_is_made(around, tmp_path):
    def made(model, surroundings):
        torch.manual_seed(3)
        with surroundings():
            adapter = patch_model(model).train_only(projector=True)
            adapter.add("other", EmmaConfig(fusion="linear"))
        return adapter

    plain = made(tiny.llava(), contextlib.nullcontext)
    model = tiny.llava()
    adapter = made(model, SURROUNDINGS[around])
    for name in ("default", "other"):
        for one in (adapter, plain):
            one.set_active(name)
        for (key, value), (_, expected) in zip(adapter.named_parameters(), plain.named_parameters(), strict=True):
            assert (value.dtype, value.device, value.is_inference()) == (torch.float32, torch.device("cpu"), False), key
            assert torch.equal(value, expected)
    adapter.set_active("default").save_pretrained(tmp_path)
    optimizer = torch.optim.SGD(adapter.parameter_groups(1e-1))
    for _ in range(2):
        optimizer.zero_grad()
        model.train()(**INPUTS, labels=INPUTS["input_ids"], instruction=torch.tensor([[5], [6]])).loss.backward()
        optimizer.step()
    assert not torch.equal(logits(model.eval()), logits(tiny.llava()))
    fresh = tiny.llava()
    with SURROUNDINGS[around]():
        loaded = load_adapter(fresh, tmp_path)
        unpatch_model(model)
    assert all(not value.is_inference() and value.dtype == torch.float32 for value in loaded.parameters())
    assert torch.equal(logits(model), logits(tiny.llava()))


@pytest.mark.parametrize("name", ["_original", "default__original", "original", "_"])
def test_an_adapter_may_have_any_name(name, tmp_path):
    model = tiny.llava()
    adapter = patch_model(model).train_only(projector=True)
    tiny.train_randomly(adapter.projector.linear_1)
    adapter.add(name)
    tiny.train_randomly(adapter.set_active(name).alignment)
    assert torch.equal(logits(model), logits(copy.deepcopy(model)))
    adapter.set_active("default").remove(name)
    with adapter.disabled():
        assert torch.equal(logits(model), logits(tiny.llava()))
