"""What is private or unstable in other libraries still is what ``emma_adapter.modules.private`` takes it for."""

from __future__ import annotations

import copy
import inspect
import re
import weakref
from pathlib import Path

import pytest
import torch
import transformers
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from transformers import DynamicCache, EncoderDecoderCache, LlamaForCausalLM, StaticCache

from emma_adapter.modules import private
from tests.support import tiny
from tests.support.remote_llava import llava_original

ANSWERS = ("answer_trainer", "stop_answering_trainer", "may_be_trained_through")


@pytest.mark.parametrize(
    "make",
    [
        DynamicCache,
        lambda: StaticCache(config=tiny.llama_config(100), max_cache_len=8),
        lambda: EncoderDecoderCache(DynamicCache(), DynamicCache()),
    ],
    ids=["dynamic", "static", "encoder-decoder"],
)
def test_a_cache_is_found_by_what_it_is(make):
    cache = make()
    assert private.is_cache(cache) and int(cache.get_seq_length()) == 0
    assert not private.is_cache(type(cache))


def test_what_is_no_cache():
    model = tiny.llava()
    assert not any(map(private.is_cache, (None, "cache", torch.zeros(1), {}, (), model, model.generation_config)))


def test_which_classes_need_another_name_for_their_cache():
    assert private.cache_names_to_bridge(transformers.LlavaForConditionalGeneration) == {}
    assert private.cache_names_to_bridge(type(llava_original())) == {"cache": "past_key_values"}

    class Newer(LlamaForCausalLM):
        def forward(self, input_ids, cache=None):
            return super().forward(input_ids)

    assert private.cache_names_to_bridge(Newer) == {"past_key_values": "cache"}


def test_generate_passes_a_cache_by_a_name_that_is_known(monkeypatch):
    """A release with a third name shows here first."""
    model, names = LlamaForCausalLM(tiny.llama_config(100)).eval(), set()
    forward = model.forward

    def note(*args, **kwargs):
        names.update(name for name, value in kwargs.items() if private.is_cache(value))
        return forward(*args, **kwargs)

    note.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(model, "forward", note)
    model.generate(torch.tensor([[1, 5]]), max_new_tokens=2, do_sample=False)
    assert names and names <= set(private._CACHE_NAMES)


def test_a_copy_of_a_dispatched_module_runs_by_itself():
    layer = torch.nn.Sequential(torch.nn.Linear(2, 2))
    add_hook_to_module(layer[0], AlignDevicesHook(execution_device="cpu", io_same_device=True))
    twin = copy.deepcopy(layer)
    private.remove_replaced_forwards(twin)
    torch.nn.init.zeros_(twin[0].weight)
    torch.nn.init.zeros_(twin[0].bias)
    x = torch.ones(1, 2)
    assert not twin(x).any() and layer(x).any()


def test_a_backward_is_noticed():
    seen = []
    value = torch.ones(2, requires_grad=True)
    value.register_hook(lambda grad: seen.append(private.is_backward_running()))
    value.sum().backward()
    assert seen == [True] and not private.is_backward_running()


def test_a_call_of_a_module_is_noticed():
    seen = []

    class Outer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = torch.nn.Linear(1, 1)

        def forward(self, x):
            seen.append((private.is_being_called(self), private.is_being_called(self.inside)))
            return self.inside(x)

    outer = Outer()
    outer.inside.register_forward_pre_hook(lambda *args: seen.append(private.is_being_called(outer)))
    outer(torch.ones(1))
    assert seen == [(True, False), True]
    assert not private.is_being_called(outer)


def test_a_transform_is_noticed():
    seen = []
    torch.vmap(lambda value: seen.append(private.is_transformed()) or value)(torch.ones(2))
    assert seen == [True] and not private.is_transformed()


def test_memory_has_an_address():
    value = torch.ones(4)
    assert private.storage_address(value) == private.storage_address(value[2:].detach())
    assert private.storage_address(value) != private.storage_address(value.clone())


def test_hooks_are_found_and_removed():
    """PyTorch's own handles say what there is to remove."""
    ran = []

    def ours(*_, **__):
        ran.append("ours")

    def theirs(*_, **__):
        ran.append("theirs")

    module = torch.nn.Linear(2, 2)
    module.register_forward_pre_hook(ours, with_kwargs=True)
    module.register_forward_hook(ours, with_kwargs=True, always_call=True)
    assert private.pre_hooks(module) == [ours] and private.is_last_hook(module, ours)
    handle = module.register_forward_hook(theirs)
    assert not private.is_last_hook(module, ours) and private.is_last_hook(module, theirs)
    twin = copy.deepcopy(module)
    private.remove_hooks(twin, [ours])
    twin(torch.ones(1, 2))
    assert ran == ["theirs"]
    module(torch.ones(1, 2))
    assert ran == ["theirs", "ours", "ours", "theirs"]
    handle.remove()
    private.remove_hooks(module, [ours])
    assert not private.pre_hooks(module)
    fresh = torch.nn.Linear(2, 2)
    held = {name: value for name, value in vars(module).items() if "hook" in name}
    assert held == {name: vars(fresh)[name] for name in held}


def test_accelerates_hooks_are_found():
    module = torch.nn.Linear(2, 2)
    assert private.accelerate_hooks(module) == []
    one, other = AlignDevicesHook(execution_device="cpu"), AlignDevicesHook(execution_device="cpu")
    add_hook_to_module(module, one)
    assert private.accelerate_hooks(module) == [one]
    add_hook_to_module(module, other, append=True)
    assert private.accelerate_hooks(module) == [one, other]


def test_what_accelerate_has_offloaded_is_found_where_it_keeps_it():
    module = torch.nn.Linear(2, 2)
    values = {name: value.detach().clone() for name, value in module.named_parameters()}
    assert private.offloaded_values(module) == {}
    cpu_offload(module, execution_device=torch.device("cpu"))
    assert module.weight.is_meta
    found = private.offloaded_values(module)
    assert found.keys() == values.keys() and all(torch.equal(found[name], values[name]) for name in values)
    assert module.weight.is_meta


def test_replicas_are_made_by_a_method_of_the_module():
    replica = getattr(torch.nn.Linear(2, 2), private.REPLICATE)()
    assert isinstance(replica, torch.nn.Linear)


def test_a_view_shares_all_but_what_is_given():
    """Of a module with hooks, a replaced forward and accelerate's: none of them runs in the view."""
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    module.register_forward_hook(lambda *_: pytest.fail("a hook of the module ran"))
    before = {name: value for name, value in vars(module).items() if name not in ("_modules", "_parameters")}
    other = torch.nn.Linear(2, 3)
    view = private.view_of(module, {"1": other}, {}, note="own")
    x = torch.ones(1, 2)
    assert torch.equal(view(x), other(module[0](x))) and type(view) is type(module)
    assert view.note == "own" and not hasattr(module, "note") and module[1] is not other
    assert before == {name: value for name, value in vars(module).items() if name in before}
    linear = private.view_of(other, {}, {"bias": torch.ones(3)})
    assert torch.equal(linear(x), x @ other.weight.T + 1) and linear.weight is other.weight
    view.register_forward_hook(lambda *_: None)
    assert len(module._forward_hooks) == 1


def test_the_cache_of_a_decoder_has_a_name():
    model = LlamaForCausalLM(tiny.llama_config(100))
    output = model.model(torch.tensor([[1, 5]]), use_cache=True)
    cache = private.cache_of(output)
    assert private.is_cache(cache) and cache.get_seq_length() == 2
    again = model.model(torch.tensor([[7]]), **{private.cache_argument(type(model.model)): cache})
    assert private.cache_of(again).get_seq_length() == 3
    assert private.cache_of(model.model(torch.tensor([[1]]), use_cache=False)) is None


def test_a_config_is_copied_with_another_attention():
    config = LlamaForCausalLM._from_config(tiny.llama_config(100), attn_implementation="eager").config
    other = private.with_attention(config, "sdpa")
    assert [private.attention_of(one) for one in (config, other)] == ["eager", "sdpa"]
    assert other.hidden_size == config.hidden_size


def test_no_ddp_runs_here():
    assert private.parameters_of_running_ddp() is None
    assert hasattr(torch.nn.parallel.DistributedDataParallel, "_get_active_ddp_module")


def test_a_running_trainer_is_found(tmp_path):
    found = []

    class Asks(torch.nn.Linear):
        def forward(self, values, labels):
            found.append(private.running_trainer())
            return {"loss": super().forward(values).square().mean()}

    rows = [{"values": [1.0, 2.0], "labels": [0.0]}] * 2
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=1, report_to=[], use_cpu=True, save_strategy="no"
    )
    trainer = transformers.Trainer(Asks(2, 2), arguments, train_dataset=rows)
    trainer.train()
    assert found == [trainer] and private.running_trainer() is None


def test_who_looks_for_a_trainer_keeps_nothing_alive(tmp_path):
    transformers.Trainer  # noqa: B018 - imports it

    class Large:
        pass

    held = Large()
    gone = weakref.ref(held)
    assert private.running_trainer() is None
    del held
    assert gone() is None


def test_every_name_of_others_is_held_by_a_test_that_exists():
    source = Path(private.__file__).read_text()
    named = re.findall(r"``((?:\w+/)?test_\w+\.py)(?:::(\w+))?``", source)
    assert len(named) > 10
    for file, test in named:
        assert f"def {test}" in (Path(__file__).parents[1] / file).read_text()
    functions = [value for value in vars(private).values() if getattr(value, "__module__", "") == private.__name__]
    untold = [function.__name__ for function in functions if "Held by" not in (function.__doc__ or "")]
    # What undoes, or is a part of, what another one does.
    assert set(untold) <= {"forget_compiled_code", "leave_out_of_saves", "expect_whole_saves", "whole_saves", *ANSWERS}
