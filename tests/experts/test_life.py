"""Experts beside other things on a model, copied, taken off, and where they are refused."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from torch import nn

from emma_adapter import (
    ConfigError,
    EmmaConfig,
    EmmaUnified,
    EmmaVisionExperts,
    PatchError,
    UnifiedConfig,
    UnsupportedModelError,
    add_vision_expert,
    get_adapter,
    load_vision_experts,
    patch_model,
    unify_model,
    unpatch_model,
)
from tests.experts.small import ROWS, change, features, learn_router, pixels_of, same, stock_with, with_expert
from tests.support import tiny
from tests.support.zoo import ZOO
from tests.unified.small import autoencoder

LABELS = ["stem", "original"] * 2
NAME = "qwen3_vl"


@pytest.fixture(scope="module")
def batch():
    return ZOO[NAME].batch(ROWS)


def routed(model=None):
    """A model whose router sends the first and third picture to the expert."""
    experts = with_expert(NAME, model=model)
    learn_router(experts, LABELS, pixels_of(ZOO[NAME].batch(ROWS)))
    return experts


def check(experts, batch, original, other) -> None:
    found = features(experts.model, batch)
    assert same(found, original) == [False, True] * 2 and same(found, other) == [True, False] * 2


def traces(model) -> set[str]:
    """What of this library is left on a model."""
    found = {name for name, _ in model.named_modules() if "emma" in name}
    for name, module in model.named_modules():
        found |= {f"{name}.{key}" for key in vars(module) if "emma" in key}
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        found |= {f"{name}: {hook}" for hook in hooks if "emma" in getattr(hook, "__module__", "")}
        found |= {f"{name}.{key}" for key, value in vars(module).items() if type(value).__name__ == "MethodGuard"}
    return found


def test_one_of_several_is_removed(batch, tmp_path):
    """The others compute and route as without it, in a saved folder too; its own images go where they say."""
    experts, model = routed(), ZOO[NAME].model()
    original, other = features(model, batch), features(stock_with(experts), batch)
    add_vision_expert(experts.model, "second")
    with torch.no_grad():
        experts.model.emma_experts.router["second/bias"].fill_(9.0)
    experts.train_only("second")
    assert experts.model.emma_experts.of("second")
    experts.remove("second")
    assert experts.names == ("stem",) and not experts.model.emma_experts.of("second")
    assert all(parameter.requires_grad for parameter in experts.model.parameters()), "frozen for an expert that is gone"
    check(experts, batch, original, other)
    experts.save_pretrained(tmp_path)
    check(load_vision_experts(model, tmp_path), batch, original, other)
    with pytest.raises(ConfigError, match="there is no expert 'second'"):
        experts.remove("second")
    experts.remove("stem")
    assert not traces(experts.model)


@pytest.mark.parametrize("take_off", [EmmaVisionExperts.remove, lambda experts: unpatch_model(experts.model)])
@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "idefics3", "llava_pixtral"])
def test_nothing_is_left_of_experts_that_are_removed(name, take_off):
    stock = ZOO[name].model()
    experts = with_expert(name)
    add_vision_expert(experts.model, "maps")
    names = list(experts.model.state_dict())
    assert [n for n in names if not n.startswith("emma_experts.")] == list(stock.state_dict())
    experts.train_only("stem")
    take_off(experts)
    assert not traces(experts.model)
    assert all(p.requires_grad for p in experts.model.parameters())
    inputs = ZOO[name].batch(ROWS)
    with torch.no_grad():
        assert torch.equal(experts.model(**inputs).logits, stock(**inputs).logits)
    with pytest.raises(PatchError, match="add_vision_expert"):
        EmmaVisionExperts(experts.model)
    with_expert(model=experts.model)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_independent(batch, copied):
    experts = routed()
    original, other = features(ZOO[NAME].model(), batch), features(stock_with(experts), batch)
    twin = EmmaVisionExperts(copied(experts.model))
    check(twin, batch, original, other)
    change(twin)
    check(experts, batch, original, other)
    assert not any(same(features(twin.model, batch)[::2], other[::2]))
    with twin.routed("original"):
        check(experts, batch, original, other)
    twin.remove()
    check(experts, batch, original, other)
    assert all(same(features(twin.model, batch), original)) and not traces(twin.model)


def unified(model):
    settings = {"processor": ZOO[NAME].processor(), "autoencoder": autoencoder()}
    return unify_model(model, UnifiedConfig(decoupling=2), **settings)


PARTS = {
    "aligned": lambda model: patch_model(model, EmmaConfig(inner_dim=8), processor=ZOO[NAME].processor()),
    "drawing": unified,
    "expert": routed,
}


@pytest.mark.parametrize(
    "order",
    [("aligned", "expert", "drawing"), ("expert", "drawing", "aligned"), ("drawing", "aligned", "expert")],
    ids=" ".join,
)
@torch.no_grad()
def test_all_parts_live_on_one_model(batch, order, tmp_path):
    model = ZOO[NAME].model()
    with torch.enable_grad():
        for part in order:
            PARTS[part](model)
    experts = EmmaVisionExperts(model)
    other = stock_with(with_same(experts))
    stock = ZOO[NAME].model()
    want, instead = stock(**batch).logits, other(**batch).logits
    rows = [torch.equal(*pair) for pair in zip(model(**batch).logits, want, strict=True)]
    assert rows == [False, True] * 2
    assert [torch.equal(*pair) for pair in zip(model(**batch).logits, instead, strict=True)] == [True, False] * 2
    model.save_pretrained(tmp_path)
    assert {"vision_experts.safetensors", "unified_model.safetensors", "emma_adapter"} <= {
        path.name for path in tmp_path.iterdir()
    }
    base = type(stock).from_pretrained(tmp_path)
    assert set(base.state_dict()) == set(stock.state_dict()) and not traces(base)
    # The other parts' removal leaves the experts.
    EmmaUnified(model).remove()
    assert experts.names == ("stem",) and get_adapter(model)
    assert [torch.equal(*pair) for pair in zip(model(**batch).logits, instead, strict=True)] == [True, False] * 2
    unpatch_model(model)
    assert not traces(model) and torch.equal(model(**batch).logits, want)


def with_same(experts):
    """The same experts on a model with nothing else."""
    twin = add_vision_expert(ZOO[NAME].model(), "stem")
    own, other = twin.model.emma_experts.state_dict(), experts.model.emma_experts.state_dict()
    assert own.keys() == other.keys()
    twin.model.emma_experts.load_state_dict(other)
    return twin


TARGETS = ["linear_fc1", "linear_fc2", "q_proj"]


@pytest.mark.parametrize("lora_first", [True, False])
def test_a_lora_adds_to_expert_and_original_alike(batch, lora_first):
    """As the same LoRA does to a stock model with the expert's weights."""
    lora = LoraConfig(r=2, target_modules=TARGETS)

    def wrap(model):
        torch.manual_seed(0)
        made = get_peft_model(model, lora)
        tiny.train_randomly(nn.ParameterList(p for n, p in made.named_parameters() if "lora_" in n), 0.1)
        return made

    if lora_first:
        peft = wrap(ZOO[NAME].model())
        experts = add_vision_expert(peft, "stem")
        base = experts.model
    else:
        experts = add_vision_expert(ZOO[NAME].model(), "stem")
        base, peft = experts.model, wrap(experts.model)
    assert not [name for name, _ in peft.named_modules() if "emma" in name and "lora" in name]
    start = features(base, batch)
    with experts.routed("stem"):
        assert all(same(features(base, batch), start)), "a new expert is the original, LoRA and all"
    change(experts)
    for parameter in base.emma_experts.router.values():
        parameter.requires_grad_(True)
    twin = with_same(experts)
    other = wrap(stock_with(twin)).get_base_model()
    with experts.routed("stem"):
        assert all(same(features(base, batch), features(other, batch)))
    with peft.disable_adapter(), experts.routed("stem"):
        assert all(same(features(base, batch), features(stock_with(twin), batch)))
    learn_router(experts, LABELS, pixels_of(batch))
    check(experts, batch, start, features(other, batch))
    assert EmmaVisionExperts(peft).model is base
    unpatch_model(peft)
    assert not traces(base) and all(same(features(base, batch), start))


def test_modes_of_a_caller_do_not_matter(batch):
    model = ZOO[NAME].model()
    with torch.inference_mode(), torch.device("meta"):
        experts = with_expert(trained=False, model=model)
    experts.train_only("stem")
    experts.model(**batch).logits.sum().backward()
    assert all(p.grad is not None for p in experts.model.emma_experts.of("stem"))


def test_a_model_that_is_moved_takes_its_experts_along():
    experts = with_expert().model.to(torch.bfloat16)
    assert {p.dtype for p in experts.emma_experts.parameters()} == {torch.bfloat16}
    batch = ZOO["llava"].batch(ROWS)
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    with EmmaVisionExperts(experts).routed("stem"):
        assert experts(**batch).logits.isfinite().all()


def test_what_cannot_work_is_refused():
    model = ZOO["llava"].model()
    for name in ("", "original", "a/b", "a.b", 3, "x" * 65):
        with pytest.raises(ConfigError, match="name"):
            add_vision_expert(model, name)
    for settings in ({"layers": 0}, {"layers": True}, {"margin": 1.0}, {"margin": -0.1}):
        with pytest.raises(ConfigError, match=next(iter(settings))):
            add_vision_expert(model, "stem", **settings)
    assert not traces(model)
    experts = add_vision_expert(model, "stem", 1)
    with pytest.raises(ConfigError, match="already"):
        add_vision_expert(model, "stem")
    with pytest.raises(ConfigError, match="layers=2"):
        add_vision_expert(model, "maps", 2)
    with pytest.raises(ConfigError, match="no expert"):
        experts.routed("maps")
    assert experts.names == ("stem",)
    with pytest.raises(PatchError, match="never learn"):
        add_vision_expert(torch.optim.swa_utils.AveragedModel(ZOO["llava"].model()), "stem")
    model = ZOO["llava"].model()
    model.model.vision_tower = nn.Identity()
    with pytest.raises(UnsupportedModelError, match="0 stacks"):
        add_vision_expert(model, "stem")


def test_offloaded_towers_are_refused():
    model = ZOO["llava"].model()
    cpu_offload(model)
    with pytest.raises(PatchError, match="offloaded"):
        add_vision_expert(model, "stem")
    experts = with_expert("llava")
    cpu_offload(experts.model)
    with pytest.raises(PatchError, match="offloaded"):
        experts.model(**ZOO["llava"].batch(ROWS))


def test_a_part_of_a_stack_that_is_quantized_is_refused():
    model = ZOO["llava"].model()
    mlp = model.model.vision_tower.encoder.layers[1].mlp
    mlp.fc1.weight = nn.Parameter(mlp.fc1.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match=r"fc1\.weight of the vision tower is quantized"):
        add_vision_expert(model, "stem")
    assert not traces(model)
