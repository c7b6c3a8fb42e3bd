"""Which family a model has, and what the error says where it has none."""

from __future__ import annotations

import re

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, LlamaForCausalLM, LlavaForConditionalGeneration

from emma_adapter import ModelFamily, UnsupportedModelError, patch_model, register_family, unpatch_model
from emma_adapter.models import registry
from emma_adapter.models.class_names import image_text_classes
from emma_adapter.models.registry import family_names, find_family
from tests.support import tiny
from tests.support.zoo import ZOO, Row


def model_of(model_type: str) -> nn.Module:
    """Return a module with the default config of a type, all that is looked at of a model without a family."""
    model = nn.Module()
    parts = {"encoder": {"model_type": "vit"}, "decoder": {"model_type": "gpt2"}}
    model.config = AutoConfig.for_model(model_type, **(parts if model_type == "vision-encoder-decoder" else {}))
    return model


def why(model: nn.Module) -> str:
    with pytest.raises(UnsupportedModelError) as error:
        find_family(model)
    return str(error.value)


def test_a_class_of_a_supported_family_is_supported_under_another_type():
    """ShieldGemma 2 is Gemma 3 by another name."""
    entry = ZOO["gemma3"]
    config = entry.model().config
    other = transformers.ShieldGemma2Config(
        text_config=config.text_config.to_dict(),
        vision_config=config.vision_config.to_dict(),
        image_token_index=config.image_token_id,
        mm_tokens_per_image=config.mm_tokens_per_image,
    )
    model = AutoModelForImageTextToText.from_config(other).eval()
    model.load_state_dict(entry.model().state_dict())
    assert model.config.model_type not in family_names()
    batch = entry.batch([Row(images=((56, 56),))])
    with torch.no_grad():
        before = model(**batch).logits
        adapter = patch_model(model, processor=entry.processor())
        assert torch.equal(model(**batch).logits, before)
        tiny.train_randomly(nn.ParameterList(adapter.parameters()))
        assert not torch.equal(model(**batch).logits, before)
    unpatch_model(model)


def test_a_subclass_is_supported_under_its_own_type():
    class MyLlava(LlavaForConditionalGeneration):
        pass

    model = tiny.llava()
    family = find_family(model)
    model.__class__ = MyLlava
    model.config.model_type = "my_llava"
    assert find_family(model) is family


def test_a_class_that_only_has_the_name_is_not():
    class LlavaForConditionalGeneration(nn.Module):
        pass

    model = LlavaForConditionalGeneration()
    model.config = AutoConfig.for_model("llava")
    model.config.model_type = "another_llava"
    assert "'another_llava' (LlavaForConditionalGeneration) is not supported" in why(model)


@pytest.mark.parametrize(
    ("model_type", "words"),
    [
        ("gemma3_text", "language model of 'gemma3' alone.*AutoModelForImageTextToText"),
        ("qwen3_vl_moe_text", "language model of 'qwen3_vl_moe' alone"),
        ("mllama_text_model", "language model of 'mllama' alone"),
        ("llama", "is a language model and sees no images"),
        ("qwen2_audio", "hears audio and sees no images"),
        ("voxtral", "hears audio and sees no images"),
        ("chameleon", "tokens of its vocabulary"),
        ("fuyu", "no vision tower"),
        ("pix2struct", "cross-attention"),
        ("instructblip", "reads the instruction already"),
        ("idefics2", r"not supported; supported are \['aya_vision'.*register_family.*docs/adding-a-family.md"),
    ],
)
def test_the_error_says_why_and_what_to_do(model_type, words):
    message = why(model_of(model_type))
    assert re.search(words, message), message
    assert ("register_family" in message) == (model_type == "idefics2")


@pytest.mark.parametrize("model_type", sorted(image_text_classes().keys() - set(family_names())))
def test_every_image_text_type_of_transformers_has_a_family_or_a_reason(model_type):
    message = why(model_of(model_type))
    assert message.startswith(f"model_type {model_type!r} (Module) ")
    # Types of transformers that show images to a language model are never taken for ones that don't.
    assert "sees no images" not in message or model_type in AUDIO_ONLY


AUDIO_ONLY = {
    "fun_asr_nano",
    "glmasr",
    "granite_speech",
    "granite_speech_plus",
    "kyutai_speech_to_text",
    "moss_transcribe_diarize",
    "nemo_speechlm",
    "omniasr",
    "qwen2_audio",
    "qwen3_asr",
    "vibevoice_asr",
    "voxtral",
    "voxtral_realtime",
}


def test_the_patched_language_model_is_refused_too():
    with pytest.raises(UnsupportedModelError, match=r"'llama' .*sees no images"):
        patch_model(LlamaForCausalLM(tiny.llama_config(50)))


class Named(ModelFamily):
    model_types = ("named",)

    def visual_dim(self, inner: nn.Module) -> int:
        return 1


@pytest.mark.parametrize("name", ["model_types", "modalities", "size_arguments"])
def test_a_string_in_place_of_names_is_refused(name, monkeypatch):
    """Its letters would be the names."""
    monkeypatch.setattr(registry, "_FAMILIES", {})
    with pytest.raises(UnsupportedModelError, match=rf"Named\.{name} must be a tuple of strings.*got 'image'"):
        register_family(type("Named", (Named,), {name: "image"})())
    assert registry._FAMILIES == {}
