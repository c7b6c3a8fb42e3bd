"""Patched models of classes that are not part of transformers: InternVL's own, and LLaVA's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from emma_adapter import EmmaConfig, InstructionError, RoutingError, load_adapter, patch_model, unpatch_model
from tests.support import tiny
from tests.support.remote_internvl import (
    internvl_chat,
    internvl_generate_inputs,
    internvl_inputs,
    internvl_row,
    internvl_tokenizer,
)
from tests.support.remote_llava import llava_generate_inputs, llava_inputs, llava_original, llava_row

EFFECT, SAME = 5e-3, 1e-4
FUSIONS = ("attention", "linear", "modulation")
TILES = [[2], [1, 3], [], [1]]
IMAGES = [1, 2, 0, 1]
PROJECTORS = ("mlp2x_gelu", "linear", "identity")
FORMS = ("batch", "list", "stacked", "anyres")
TOLD = torch.tensor([[31, 41], [32, 42], [33, 43], [34, 44]])


def train(adapter) -> None:
    tiny.train_randomly(nn.ParameterList(adapter.parameters()))


@torch.no_grad()
def logits(model: nn.Module, inputs: dict[str, Any], **more: Any) -> Tensor:
    return model(**inputs, **more).logits


def left_padded_llava(**settings: Any):
    return llava_original(padding_side="left", **settings)


# ------------------------------------------------------------------------------------------------------- InternVL


@pytest.mark.parametrize("fusion", FUSIONS)
def test_internvl_chat(fusion, tmp_path):
    model, inputs = internvl_chat(), internvl_inputs(TILES)
    keys, before = list(model.state_dict()), logits(model, inputs)
    adapter = patch_model(model, EmmaConfig(fusion=fusion, inner_dim=16))
    assert torch.equal(logits(model, inputs), before)
    assert len(model.mlp1) == 4
    train(adapter)
    changed = logits(model, inputs)
    effect = (changed - before)[:, -1].abs().amax(dim=1)
    assert effect[[0, 1, 3]].min() > EFFECT
    assert effect[2] == 0
    for row in range(len(TILES)):
        alone = logits(model, internvl_row(inputs, TILES, row))[:, -1]
        torch.testing.assert_close(changed[[row], -1], alone, atol=SAME, rtol=0)
    adapter.save_pretrained(tmp_path)
    other = internvl_chat()
    load_adapter(other, tmp_path)
    assert torch.equal(logits(other, inputs), changed)
    with adapter.disabled():
        assert torch.equal(logits(model, inputs), before)
    unpatch_model(model)
    assert list(model.state_dict()) == keys
    assert torch.equal(logits(model, inputs), before)


def test_internvl_generates_what_forward_says():
    model = internvl_chat()
    train(patch_model(model))
    inputs = internvl_inputs(TILES)
    expected = logits(model, inputs)[:, -1].argmax(dim=-1)
    written = model.generate(**internvl_generate_inputs(inputs), max_new_tokens=1, do_sample=False)
    assert torch.equal(written[:, -1], expected)
    told = model.generate(**internvl_generate_inputs(inputs), max_new_tokens=1, do_sample=False, instruction=TOLD)
    assert torch.equal(told[:, -1], logits(model, inputs, instruction=TOLD)[:, -1].argmax(dim=-1))
    beams = model.generate(**internvl_generate_inputs(inputs), max_new_tokens=2, num_beams=3)
    for row in (0, 1, 3):
        alone = internvl_generate_inputs(internvl_row(inputs, TILES, row))
        assert torch.equal(model.generate(**alone, max_new_tokens=2, num_beams=3)[0], beams[row])


def test_internvl_chat_method_asks_about_the_question():
    """``chat`` writes the prompt itself, and only then tells the model its placeholder."""
    model, words = internvl_chat(set_context_token=False), internvl_tokenizer()
    adapter = patch_model(model, processor=words)
    train(adapter)
    pixels = internvl_inputs([[2]])["pixel_values"]
    with pytest.raises(RoutingError, match="img_context_token_id"):
        model(**internvl_inputs([[2]]))
    seen = []
    adapter.alignment.register_forward_pre_hook(lambda module, args: seen.append(args[1:]))
    settings = {"max_new_tokens": 2, "do_sample": False}
    for question in ("is there a cat?", "how many dogs are there?"):
        model.chat(words, pixels, question, dict(settings))
    assert len(seen) == 2
    assert seen[0][0].shape != seen[1][0].shape or not torch.equal(seen[0][0], seen[1][0])
    assert "IMG_CONTEXT" not in words.decode(torch.tensor([model.img_context_token_id])).replace("<IMG_CONTEXT>", "")


def test_internvl_features_without_a_prompt_need_an_instruction():
    model = internvl_chat()
    adapter = patch_model(model)
    train(adapter)
    inputs = internvl_inputs([[2]])
    with pytest.raises(InstructionError, match=r"adapter\.instruction"):
        model.extract_feature(inputs["pixel_values"])
    with torch.no_grad(), adapter.instruction(TOLD[:1]):
        features = model.extract_feature(inputs["pixel_values"])
    shown = internvl_generate_inputs(inputs)
    settings = {"max_new_tokens": 3, "do_sample": False}
    precomputed = model.generate(**shown, visual_features=features, **settings)
    assert torch.equal(precomputed, model.generate(**shown, instruction=TOLD[:1], **settings))


# ----------------------------------------------------------------------------------------------- LLaVA's own classes


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("projector", PROJECTORS)
@pytest.mark.parametrize("form", FORMS)
def test_llavas_own_classes(fusion, projector, form, tmp_path):
    merge = "spatial_unpad" if form == "anyres" else "flat"
    model = left_padded_llava(projector=projector, patch_merge=merge)
    inputs = llava_inputs(IMAGES, form=form, padding_side="left")
    keys, before = list(model.state_dict()), logits(model, inputs)
    adapter = patch_model(model, EmmaConfig(fusion=fusion, inner_dim=16))
    assert torch.equal(logits(model, inputs), before)
    train(adapter)
    changed = logits(model, inputs)
    effect = (changed - before)[:, -1].abs().amax(dim=1)
    assert effect[[0, 1, 3]].min() > EFFECT
    assert effect[2] < SAME
    for row in range(len(IMAGES)):
        alone = logits(model, llava_row(inputs, IMAGES, row))[:, -1]
        torch.testing.assert_close(changed[[row], -1], alone, atol=SAME, rtol=0)
    written = model.generate(**llava_generate_inputs(inputs), max_new_tokens=2, do_sample=False)
    assert torch.equal(written[:, 0], changed[:, -1].argmax(dim=-1))
    adapter.save_pretrained(tmp_path)
    other = left_padded_llava(projector=projector, patch_merge=merge)
    load_adapter(other, tmp_path)
    assert torch.equal(logits(other, inputs), changed)
    unpatch_model(model)
    assert list(model.state_dict()) == keys
    assert torch.equal(logits(model, inputs), before)


@pytest.mark.parametrize("llm", ["llama", "qwen"])
def test_llava_forks_and_old_model_types(llm):
    model = left_padded_llava(llm=llm)
    if llm == "llama":
        model.config.model_type = "llava"
    train(patch_model(model))
    inputs = llava_inputs(IMAGES, padding_side="left")
    if llm == "qwen":
        inputs["modalities"] = ["image"] * len(IMAGES)
    told = logits(model, inputs, instruction=TOLD)
    other = TOLD.clone()
    other[1] = 60
    moved = (logits(model, inputs, instruction=other) - told)[:, -1].abs().amax(dim=1)
    assert (moved > EFFECT).tolist() == [False, True, False, False]


def test_a_projector_without_weights_can_be_trained_and_disabled():
    model = left_padded_llava(projector="identity")
    inputs = llava_inputs(IMAGES, padding_side="left")
    before = logits(model, inputs)
    adapter = patch_model(model).train_only(projector=True)
    train(adapter)
    with adapter.disabled():
        assert torch.equal(logits(model, inputs), before)


def test_llava_with_images_missing_is_an_error():
    model = left_padded_llava()
    patch_model(model)
    inputs = llava_inputs(IMAGES, padding_side="left")
    inputs["images"] = inputs["images"][:-1]
    with pytest.raises(RoutingError, match="one image for each placeholder"):
        model(**inputs)


@pytest.mark.parametrize("projector", ["mlp2x_gelu", "linear"])
@pytest.mark.parametrize("patch_first", [True, False])
def test_lora_on_the_projector_sees_aligned_tokens(projector, patch_first):
    model = left_padded_llava(projector=projector)
    target = "mm_projector.0" if projector == "mlp2x_gelu" else "mm_projector"
    lora = LoraConfig(r=4, target_modules=[f"model.{target}"], init_lora_weights=False)
    if patch_first:
        adapter = patch_model(model)
        wrapped = get_peft_model(model, lora)
    else:
        wrapped = get_peft_model(model, lora)
        adapter = patch_model(wrapped)
    train(adapter)
    inputs = llava_inputs(IMAGES, padding_side="left")
    seen: dict[str, Tensor] = {}
    layer = wrapped.base_model.model.model.get_submodule(target)
    layer.base_layer.register_forward_pre_hook(lambda module, args: seen.update(base=args[0].detach()))
    layer.lora_A["default"].register_forward_pre_hook(lambda module, args: seen.update(lora=args[0].detach()))
    with torch.no_grad():
        wrapped.base_model.model(**inputs)
    assert torch.equal(seen["base"], seen["lora"])


@pytest.mark.parametrize("with_processor", [True, False])
def test_placeholders_are_no_words(with_processor):
    """How large the image is must not be part of the question, whatever the vocabulary knows of the placeholder."""
    model = internvl_chat()
    adapter = patch_model(model, processor=internvl_tokenizer() if with_processor else None)
    train(adapter)
    lengths = []
    adapter.alignment.register_forward_pre_hook(lambda module, args: lengths.append(args[1].shape[1]))
    for tiles in (1, 3):
        logits(model, internvl_inputs([[tiles]]))
    assert lengths[0] == lengths[1]
