"""What is private or unstable in other libraries still is what ``emma_adapter.private`` takes it for."""

from __future__ import annotations

import inspect

import pytest
import torch
import transformers
from transformers import DynamicCache, EncoderDecoderCache, LlamaForCausalLM, StaticCache

import tiny
from emma_adapter import private
from remote_llava import llava_original


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
