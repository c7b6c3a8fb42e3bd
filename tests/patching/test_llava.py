"""The behaviour of a patched LLaVA: what every fusion and every kind of instruction encoder must keep to."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    BeitConfig,
    Dinov2Config,
    DynamicCache,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
)

from emma_adapter import (
    ConfigError,
    EmmaConfig,
    InstructionError,
    PatchError,
    RoutingError,
    UnsupportedModelError,
    get_adapter,
    patch_model,
    unpatch_model,
)
from tests.support import tiny
from tests.support.budget import budget

FUSIONS = ("attention", "linear", "modulation")
ENCODERS = ("llm", "clip", "custom")
EFFECT = 1e-3  # what a trained adapter changes at least, far above rounding
SAME = 2e-5


class WordHashEncoder(nn.Module):
    """An instruction encoder of a user's own: a fixed random vector per character."""

    instruction_dim = 12
    max_instruction_tokens = 20

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(256, self.instruction_dim)

    def forward(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        codes = [[ord(c) % 256 for c in text[: self.max_instruction_tokens]] for text in texts]
        ids = torch.zeros(len(texts), max(1, *map(len, codes)), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, code in enumerate(codes):
            ids[row, : len(code)] = torch.tensor(code, dtype=torch.long)
            mask[row, : len(code)] = 1
        return self.table(ids.to(self.table.weight.device)), mask


def patched(
    fusion: str = "attention",
    encoder: str = "llm",
    *,
    clip_folder=None,
    with_processor: bool = True,
    trained: bool = True,
):
    model = tiny.llava()
    given = {"llm": "llm", "clip": str(clip_folder), "custom": WordHashEncoder()}[encoder]
    config = EmmaConfig(fusion=fusion, inner_dim=16)
    processor = tiny.processor() if with_processor else None
    adapter = patch_model(model, config, processor=processor, instruction_encoder=given)
    if trained:
        tiny.train_randomly(adapter.alignment)
    return model, adapter


@pytest.fixture(params=FUSIONS)
def fusion(request):
    return request.param


@pytest.fixture(params=ENCODERS)
def encoder(request):
    return request.param


@torch.no_grad()
def logits(model: nn.Module, inputs: dict[str, Tensor], **more) -> Tensor:
    return model(**inputs, **more).logits


@torch.no_grad()
def image_features(model: nn.Module, inputs: dict[str, Tensor], **more) -> Tensor:
    return tiny.image_features(model(**inputs, **more))


def last_logits(model: nn.Module, inputs: dict[str, Tensor], **more) -> Tensor:
    return logits(model, inputs, **more)[:, -1]


# ------------------------------------------------------------------------------------------ identity


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_untrained_and_unpatched_are_the_original_bit_for_bit(fusion, encoder, dtype, clip_folder):
    model = tiny.llava().to(dtype)
    inputs = tiny.token_inputs([1, 2, 0, 3])
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    before, generated = logits(model, inputs), model.generate(**inputs, max_new_tokens=4, do_sample=False)
    given = {"llm": "llm", "clip": str(clip_folder), "custom": WordHashEncoder()}[encoder]
    adapter = patch_model(model, EmmaConfig(fusion=fusion), processor=tiny.processor(), instruction_encoder=given)
    assert torch.equal(logits(model, inputs), before)
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), generated)
    tiny.train_randomly(adapter.alignment)
    assert not torch.equal(logits(model, inputs), before)
    unpatch_model(model)
    assert torch.equal(logits(model, inputs), before)
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), generated)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_untrained_is_the_original_at_sizes_where_layout_decides_how_a_product_is_rounded(fusion, frozen, training):
    text, vision = tiny.llama_config(380), tiny.vision_config()
    for config in (text, vision):
        config.hidden_size = config.intermediate_size = 128
    text.head_dim = 32
    model = tiny.llava(text_config=text, vision_config=vision).train(training).requires_grad_(not frozen)
    inputs = tiny.token_inputs([1, 2, 0, 3])
    before = logits(model, inputs)
    patch_model(model, EmmaConfig(fusion=fusion))
    assert torch.equal(logits(model, inputs), before)


def test_changed_when_on_equal_when_off_same_when_on_again(fusion, encoder, clip_folder):
    inputs = tiny.token_inputs([1, 2])
    original = logits(tiny.llava(), inputs)
    model, adapter = patched(fusion, encoder, clip_folder=clip_folder)
    trained = logits(model, inputs)
    assert (trained - original).abs().amax(dim=(1, 2)).min() > EFFECT
    with adapter.disabled():
        assert torch.equal(logits(model, inputs), original)
        with adapter.disabled():
            pass
        assert torch.equal(logits(model, inputs), original)
        assert torch.equal(
            model.generate(**inputs, max_new_tokens=3, do_sample=False),
            tiny.llava().generate(**inputs, max_new_tokens=3, do_sample=False),
        )
    assert torch.equal(logits(model, inputs), trained)


def test_unpatching_leaves_nothing_behind(fusion):
    model = tiny.llava()
    inputs = tiny.token_inputs([1])
    logits(model, inputs)
    classes = [cls for module in model.modules() for cls in type(module).__mro__]
    class_state = {cls: dict(vars(cls)) for cls in classes}
    modules, keys = snapshot(model), list(model.state_dict())
    adapter = patch_model(model, EmmaConfig(fusion=fusion), processor=tiny.processor()).train_only(projector=True)
    tiny.train_randomly(adapter.alignment)
    logits(model, inputs)
    assert snapshot(model) != modules
    unpatch_model(model)
    assert snapshot(model) == modules
    assert list(model.state_dict()) == keys
    assert {cls: dict(vars(cls)) for cls in classes} == class_state
    with pytest.raises(PatchError, match="not patched"):
        unpatch_model(model)


def snapshot(model: nn.Module) -> dict[str, dict]:
    """Attributes and hooks of every module; tensors by value, because parameters are moved, not replaced."""

    def simplified(value):
        return list(value.items()) if isinstance(value, dict) else value

    return {
        name: {key: simplified(value) for key, value in vars(module).items() if key not in ("_parameters", "_buffers")}
        for name, module in model.named_modules()
    }


def test_patching_one_model_leaves_its_twin_alone():
    inputs = tiny.token_inputs([1, 1])
    twin = tiny.llava()
    before = logits(twin, inputs)
    patched()
    assert torch.equal(logits(twin, inputs), before)
    with pytest.raises(PatchError):
        get_adapter(twin)


def test_base_state_dict_keys_stay():
    model = tiny.llava()
    keys = set(model.state_dict())
    patch_model(model)
    new = set(model.state_dict()) - keys
    assert keys < set(model.state_dict())
    assert all(".multi_modal_projector.emma." in key for key in new)


def test_base_checkpoint_loads_into_a_patched_model():
    model, _ = patched()
    missing, unexpected = model.load_state_dict(tiny.llava(seed=3).state_dict(), strict=False)
    assert not unexpected
    assert all(".emma." in key for key in missing)


# ------------------------------------------------------------------------------------------- routing


def test_each_row_is_what_it_is_alone(fusion, encoder, clip_folder):
    images = [1, 2, 0, 3]
    model, _ = patched(fusion, encoder, clip_folder=clip_folder)
    inputs = tiny.token_inputs(images)
    together = last_logits(model, inputs)
    for row in range(len(images)):
        alone = last_logits(model, tiny.select_row(inputs, images, row))
        torch.testing.assert_close(together[row : row + 1], alone, atol=SAME, rtol=0)


@settings(max_examples=budget(5, 15))
@given(
    images=st.lists(st.integers(0, 3), min_size=1, max_size=5).filter(any),
    padding_side=st.sampled_from(["left", "right"]),
    data=st.data(),
)
def test_order_of_rows_does_not_matter(images, padding_side, data):
    model, _ = shared_model()
    order = data.draw(st.permutations(range(len(images))))
    inputs = tiny.token_inputs(images, padding_side=padding_side)
    firsts = [sum(images[:row]) for row in range(len(images))]
    permuted = {name: inputs[name][list(order)] for name in ("input_ids", "attention_mask")}
    pixels = [firsts[row] + i for row in order for i in range(images[row])]
    permuted["pixel_values"] = inputs["pixel_values"][pixels]
    expected, got = logits(model, inputs)[list(order)], logits(model, permuted)
    valid = permuted["attention_mask"].bool()
    torch.testing.assert_close(got[valid], expected[valid], atol=SAME, rtol=0)


_SHARED = []


def shared_model():
    if not _SHARED:
        _SHARED.append(patched(with_processor=False))
    return _SHARED[0]


def test_a_row_ignores_instruction_and_images_of_other_rows():
    model, _ = patched()
    talks = [[tiny.user("how many dogs are there?")], [tiny.user("is there a cat?", images=2)]]
    before = last_logits(model, tiny.chat_inputs(talks))
    changed = [talks[0], [tiny.user("describe the left bird in detail, in the image", images=1)]]
    inputs = tiny.chat_inputs(changed)
    inputs["pixel_values"][1:] = inputs["pixel_values"][1:].flip(0) + 1
    after = last_logits(model, inputs)
    torch.testing.assert_close(after[0], before[0], atol=SAME, rtol=0)
    assert (after[1] - before[1]).abs().max() > EFFECT


def test_the_instruction_reaches_the_images_of_its_row_only():
    model, _ = patched(with_processor=False)
    inputs = tiny.token_inputs([1, 2, 1])
    before = image_features(model, inputs)
    inputs["input_ids"] = inputs["input_ids"].clone()
    inputs["input_ids"][1, -1] = 77
    after = image_features(model, inputs)
    moved = (after - before).abs().view(4, -1).amax(dim=1)
    assert moved[[0, 3]].max() == 0
    assert moved[[1, 2]].min() > EFFECT


@pytest.mark.parametrize("images", [2, 4])
def test_images_and_placeholders_that_do_not_match_are_an_error(images):
    model, _ = patched(with_processor=False)
    inputs = tiny.token_inputs([1, 2])
    inputs["pixel_values"] = torch.randn(images, *inputs["pixel_values"].shape[1:])
    with pytest.raises(RoutingError, match="placeholder"):
        model(**inputs)
    model(**tiny.token_inputs([1, 2]))


def test_a_picture_without_a_placeholder_is_an_error():
    model, _ = patched(with_processor=False)
    inputs = tiny.token_inputs([0, 0])
    with pytest.raises(RoutingError, match="1 images can't share 0 placeholder tokens"):
        model(**inputs, pixel_values=torch.randn(1, 3, 28, 28))


def test_an_image_that_crosses_rows_is_an_error():
    model, _ = patched(with_processor=False)
    inputs = tiny.token_inputs([1, 1])
    ids = inputs["input_ids"]
    ids[0, (ids[0] == 4).nonzero()[0]] = 60
    ids[1, -1] = 4
    with pytest.raises(RoutingError, match="row"):
        model(**inputs)


def test_pixtral_tower_packs_images_of_different_sizes():
    model = tiny.pixtral_llava()
    adapter = patch_model(model)
    sizes = torch.tensor([[28, 56], [56, 42]])
    ids = torch.tensor([[3, 3, 3, 3, 1, 5, *[4] * 8, 6, 7], [1, *[4] * 12, 7, 8, 9]])
    inputs = {"input_ids": ids, "attention_mask": (ids != 3).long()}
    pixels = torch.randn(2, 3, 56, 56)
    original = logits(model, inputs, pixel_values=pixels, image_sizes=sizes)
    tiny.train_randomly(adapter.alignment)
    together = last_logits(model, inputs, pixel_values=pixels, image_sizes=sizes)
    assert (together - original[:, -1]).abs().max() > EFFECT
    alone = last_logits(
        model,
        {"input_ids": ids[1:], "attention_mask": (ids[1:] != 3).long()},
        pixel_values=pixels[1:],
        image_sizes=sizes[1:],
    )
    torch.testing.assert_close(together[1:], alone, atol=SAME, rtol=0)


def other_vision_tower(name: str):
    size = {
        "hidden_size": tiny.WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
    }
    if name == "siglip":
        return SiglipVisionConfig(**size, intermediate_size=64), {"vision_feature_select_strategy": "full"}
    if name == "dinov2":
        return Dinov2Config(**size), {"vision_feature_select_strategy": "default"}
    if name == "clip with its class token":
        return tiny.vision_config(), {"vision_feature_select_strategy": "full", "image_seq_length": 5}
    if name == "clip, two layers":
        return tiny.vision_config(), {"vision_feature_layer": [-2, -1]}
    return BeitConfig(**size, intermediate_size=64), {"vision_feature_select_strategy": "default"}


@pytest.mark.parametrize("name", ["siglip", "dinov2", "clip with its class token", "clip, two layers", "beit"])
@pytest.mark.parametrize("fusion", ["attention", "linear"])
def test_other_vision_towers(name, fusion):
    vision, changes = other_vision_tower(name)
    model = tiny.llava(vision_config=vision, **changes)
    per_image = changes.get("image_seq_length", tiny.TOKENS_PER_IMAGE)
    ids = torch.tensor([[1, *[4] * per_image, 10, 11], [1, *[4] * per_image, 12, 13]])
    inputs = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 28, 28)}
    before = logits(model, inputs)
    if (name, fusion) == ("beit", "linear"):
        with pytest.raises(ConfigError, match="num_visual_tokens"):
            patch_model(model, EmmaConfig(fusion=fusion))
        return
    adapter = patch_model(model, EmmaConfig(fusion=fusion))
    assert adapter.config.num_visual_tokens == (None if name == "beit" else per_image)
    assert torch.equal(logits(model, inputs), before)
    tiny.train_randomly(adapter.alignment)
    assert (logits(model, inputs) - before).abs().amax(dim=(1, 2)).min() > EFFECT


# ------------------------------------------------------------------------------------------ generate


def generate_logits(model, inputs, **more):
    out = model.generate(
        **inputs, **more, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    return out.logits[0]


def test_generate_sees_what_forward_sees(fusion, encoder, clip_folder):
    model, _ = patched(fusion, encoder, clip_folder=clip_folder)
    for inputs in (
        tiny.token_inputs([1, 2, 0]),
        tiny.chat_inputs([[tiny.user("is there a cat?")], [tiny.user("why?")]]),
    ):
        torch.testing.assert_close(generate_logits(model, inputs), last_logits(model, inputs), atol=SAME, rtol=0)


@pytest.mark.parametrize(
    "how",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"num_return_sequences": 2, "do_sample": True, "top_k": 1},
        {"do_sample": True, "top_k": 1},
        {"cache_implementation": "static"},
        {"use_cache": False},
    ],
)
def test_generation_modes_keep_rows_apart(how):
    images = [1, 2, 0, 1]
    model, _ = patched(with_processor=False)
    model.generation_config.eos_token_id = None
    inputs = tiny.token_inputs(images)
    together = model.generate(**inputs, max_new_tokens=4, **how)
    k = how.get("num_return_sequences", 1)
    for row in range(len(images)):
        alone = model.generate(**tiny.select_row(inputs, images, row), max_new_tokens=4, **how)
        assert torch.equal(together[row * k : (row + 1) * k, -4:], alone[:, -4:])


def test_generation_uses_the_instruction_of_the_prompt_not_of_what_it_writes():
    model, _ = patched(with_processor=False)
    model.generation_config.eos_token_id = None
    inputs = tiny.token_inputs([1, 1])
    cached = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    uncached = model.generate(**inputs, max_new_tokens=5, do_sample=False, use_cache=False)
    assert torch.equal(cached, uncached)


def test_decoding_steps_do_no_adapter_work():
    model, adapter = patched(with_processor=False)
    model.generation_config.eos_token_id = None
    calls = []
    adapter.alignment.register_forward_hook(lambda *_: calls.append(1))
    model.generate(**tiny.token_inputs([1, 2]), max_new_tokens=6, do_sample=False)
    assert len(calls) == 1


def test_a_second_turn_with_a_cache_and_a_new_image():
    model, _ = patched(with_processor=False)
    model.generation_config.eos_token_id = None
    first = tiny.token_inputs([1])
    out = model.generate(**first, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    second = tiny.token_inputs([1], seed=9)
    ids = torch.cat([out.sequences, second["input_ids"]], dim=1)
    told = {"instruction": torch.tensor([[31, 41]])}
    continued = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=second["pixel_values"],
        past_key_values=out.past_key_values,
        max_new_tokens=3,
        do_sample=False,
        **told,
    )
    assert continued.shape[1] == ids.shape[1] + 3
    # The cache holds the first image under its own instruction; only the second is encoded now.
    features = []
    handle = model.model.multi_modal_projector.register_forward_hook(lambda m, a, o: features.append(o))
    alone = {**second, "attention_mask": torch.ones_like(second["input_ids"])}
    expected = image_features(model, alone, **told)
    handle.remove()
    assert torch.equal(features[0].flatten(0, 1), expected)


class RemembersElsewhere(LlavaForConditionalGeneration):
    """Takes its cache by an argument that nobody has heard of, and inside of something else."""

    def generate(self, *args, memory=None, **kwargs):
        cache = {} if memory is None else {"past_key_values": memory.held}
        return super().generate(*args, **kwargs, **cache)


def chat_of_two_rows(model):
    """Two rows in their second turn: the images of the first are row 1's, those of the second row 0's. The placeholders
    of both turns, divided among the new images, would lead one of these to row 1."""
    first, second = tiny.token_inputs([0, 2]), tiny.token_inputs([2, 0], seed=9)
    begun = model.generate(
        **first, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, instruction=["a", "b"]
    )
    ids = torch.cat([begun.sequences, second["input_ids"]], dim=1)
    settings = {"max_new_tokens": 2, "do_sample": False, "instruction": ["is there a cat?", "how many dogs?"]}
    return begun.past_key_values, {**second, "input_ids": ids, "attention_mask": torch.ones_like(ids), **settings}


def test_a_cache_that_is_hidden_from_us_is_an_error_and_never_another_rows_instruction():
    model = tiny.llava()
    model.__class__ = RemembersElsewhere
    adapter = patch_model(model, processor=tiny.processor())
    tiny.train_randomly(adapter.alignment)
    model.generation_config.eos_token_id = None
    cache, inputs = chat_of_two_rows(model)
    met = []
    adapter.alignment.register_forward_hook(lambda module, args, output: met.append(output))
    told = model.generate(**inputs, memory=None, past_key_values=copy.deepcopy(cache))
    assert told.shape[1] == inputs["input_ids"].shape[1] + 2
    with torch.no_grad(), adapter.instruction("is there a cat?"):
        model.get_image_features(pixel_values=inputs["pixel_values"])
    # With a cache that is seen, each image meets the instruction of its own row.
    torch.testing.assert_close(met[0], met[1], atol=SAME, rtol=0)
    hidden = {"memory": SimpleNamespace(held=copy.deepcopy(cache))}
    if Version(transformers.__version__) >= Version("5.18"):
        with pytest.raises(RoutingError, match="Image features and image tokens do not match"):
            model.generate(**inputs, **hidden)
    else:
        # It encodes images within forward, whose ids are those of the images.
        assert torch.equal(model.generate(**inputs, **hidden), told)
        torch.testing.assert_close(met[2], met[1], atol=SAME, rtol=0)


def test_two_caches_of_different_lengths_are_an_error():
    model, _ = patched()
    cache, inputs = chat_of_two_rows(model)
    with pytest.raises(RoutingError, match="different lengths"):
        model.generate(**inputs, cache=cache, past_key_values=DynamicCache())


# ------------------------------------------------------------------------------- explicit instruction


def test_explicit_instruction_wins(fusion):
    model, _ = patched(fusion)
    asked = [[tiny.user("how many dogs are there?")], [tiny.user("is there a cat?")]]
    other = [[tiny.user("what colour is it?")], [tiny.user("describe the image")]]
    texts = ["how many dogs are there?", "is there a cat?"]
    inferred = image_features(model, tiny.chat_inputs(asked))
    told = image_features(model, tiny.chat_inputs(other), instruction=texts)
    torch.testing.assert_close(told, inferred, atol=SAME, rtol=0)
    assert (image_features(model, tiny.chat_inputs(other)) - inferred).abs().max() > EFFECT


def test_explicit_instruction_takes_text_token_ids_or_a_tokenizer_output(processor):
    model, _ = patched()
    inputs = tiny.chat_inputs([[tiny.user("x")], [tiny.user("x")]])
    texts = ["is there a cat?", "how many dogs are there, and what colour is the left one?"]
    expected = logits(model, inputs, instruction=texts)
    encoded = processor.tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    for form in (
        {"instruction": ids, "instruction_mask": mask},
        {"instruction": encoded},
        {"instruction": tuple(texts)},
    ):
        torch.testing.assert_close(logits(model, inputs, **form), expected, atol=SAME, rtol=0)
    torch.testing.assert_close(
        generate_logits(model, inputs, instruction=ids, instruction_mask=mask), expected[:, -1], atol=SAME, rtol=0
    )
    one_for_all = logits(model, inputs, instruction=texts[0])
    torch.testing.assert_close(one_for_all, logits(model, inputs, instruction=[texts[0]] * 2), atol=0, rtol=0)


def test_token_ids_reach_a_text_tower_as_text(clip_folder, processor):
    model, _ = patched("attention", "clip", clip_folder=clip_folder)
    inputs = tiny.chat_inputs([[tiny.user("x")]])
    ids = processor.tokenizer(["is there a cat?"], add_special_tokens=False, return_tensors="pt")["input_ids"]
    assert torch.equal(logits(model, inputs, instruction=ids), logits(model, inputs, instruction=["is there a cat?"]))


@pytest.mark.parametrize(
    "wrong",
    [
        {"instruction": ["one", "two", "three"]},
        {"instruction": 5},
        {"instruction": ["one", 2]},
        {"instruction": []},
        {"instruction": torch.zeros(2, 3)},
        {"instruction": torch.zeros(3, dtype=torch.long)},
        {"instruction": torch.ones(2, 3, dtype=torch.long), "instruction_mask": torch.ones(2, 2)},
        {"instruction": {"attention_mask": torch.ones(2, 2)}},
    ],
)
def test_an_instruction_that_does_not_fit_the_call_is_an_error(wrong):
    model, _ = patched()
    inputs = tiny.chat_inputs([[tiny.user("x")], [tiny.user("y")]])
    for call in (model, model.generate):
        with pytest.raises(InstructionError, match="instruction"):
            call(**inputs, **wrong)
    model(**inputs)


def test_text_without_a_tokenizer_is_an_error_that_names_the_remedy(clip_folder):
    model, _ = patched(with_processor=False)
    with pytest.raises(InstructionError, match="processor="):
        model(**tiny.token_inputs([1]), instruction=["how many?"])
    model, _ = patched("attention", "clip", clip_folder=clip_folder, with_processor=False)
    with pytest.raises(InstructionError, match="processor="):
        model(**tiny.token_inputs([1]))
    model(**tiny.token_inputs([1]), instruction=["how many?"])


def test_empty_instruction_leaves_the_image_untouched():
    inputs = tiny.chat_inputs([[tiny.user("x")]])
    for fusion in ("attention", "modulation"):
        model, adapter = patched(fusion)
        with adapter.disabled():
            original = logits(model, inputs)
        assert torch.equal(logits(model, inputs, instruction=[""]), original)


def test_inputs_embeds_need_an_explicit_instruction():
    model, _ = patched(with_processor=False)
    inputs = tiny.token_inputs([1, 2])
    told = {"instruction": torch.tensor([[31], [32]])}
    expected = logits(model, inputs, **told)
    ids = inputs.pop("input_ids")
    inputs["inputs_embeds"] = model.get_input_embeddings()(ids).detach()
    torch.testing.assert_close(logits(model, inputs, **told), expected, atol=SAME, rtol=0)
    with pytest.raises(InstructionError, match="inputs_embeds"):
        model(**inputs)


def test_calls_without_images_need_no_instruction():
    model, _ = patched(with_processor=False)
    inputs = tiny.token_inputs([0, 0])
    assert torch.equal(logits(model, inputs), logits(tiny.llava(), inputs))
    model.generate(**inputs, instruction=torch.tensor([[5], [6]]), max_new_tokens=2)


# ------------------------------------------------------------------------------------------ training


def labelled(answer: str) -> dict[str, Tensor]:
    prompt = tiny.chat_inputs([[tiny.user("what is in the picture?")]])
    whole = tiny.chat_inputs([[tiny.user("what is in the picture?"), tiny.assistant(answer)]], generate=False)
    labels = whole["input_ids"].clone()
    labels[:, : prompt["input_ids"].shape[1]] = -100
    return {**whole, "labels": labels}


@pytest.mark.parametrize("with_processor", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_answers_never_reach_the_visual_tokens(fusion, with_processor, training):
    model, _ = patched(fusion, with_processor=with_processor)
    model.train(training)
    one, other = labelled("a red bird"), labelled("two dogs, and a tree")
    assert one["input_ids"].shape != other["input_ids"].shape
    features = [tiny.image_features(model(**inputs)) for inputs in (one, other)]
    assert torch.equal(*features)


def test_the_whole_conversation_without_labels_does_not_leak_with_a_template():
    model, _ = patched()
    one, other = labelled("a red bird"), labelled("two dogs")
    assert torch.equal(
        image_features(model, {k: v for k, v in one.items() if k != "labels"}),
        image_features(model, {k: v for k, v in other.items() if k != "labels"}),
    )


def test_training_without_labels_or_template_is_an_error():
    model, _ = patched(with_processor=False)
    inputs = labelled("a red bird")
    del inputs["labels"]
    model.train()
    with pytest.raises(InstructionError, match="labels"):
        model(**inputs)
    model(**inputs, instruction=torch.tensor([[5, 6]]))
    with torch.no_grad():
        model(**inputs)


def test_generate_in_the_midst_of_training_has_no_answer_to_leak():
    model, _ = patched(with_processor=False)
    inputs = tiny.token_inputs([1, 2])
    expected = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert torch.equal(model.train().generate(**inputs, max_new_tokens=3, do_sample=False), expected)


def test_labels_that_supervise_the_whole_prompt_are_an_error():
    """With a processor, the template tells what the user said."""
    model, _ = patched(with_processor=False)
    inputs = labelled("a red bird")
    inputs["labels"] = inputs["input_ids"].clone()
    with pytest.raises(InstructionError, match="-100"):
        model.train()(**inputs)


@pytest.mark.parametrize("patch_first", [True, False])
def test_answers_do_not_leak_through_a_peft_model(patch_first):
    model = tiny.llava()
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    if patch_first:
        adapter = patch_model(model)
        wrapped = get_peft_model(model, lora)
    else:
        wrapped = get_peft_model(model, lora)
        adapter = patch_model(wrapped)
    tiny.train_randomly(adapter.alignment)
    adapter.alignment.requires_grad_(True)
    wrapped.train()
    outputs = [wrapped(**labelled(answer)) for answer in ("a red bird", "two dogs")]
    assert torch.equal(*map(tiny.image_features, outputs))
    outputs[0].loss.backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())
    assert any(p.grad is not None for n, p in wrapped.named_parameters() if "lora_" in n)
    wrapped.eval()
    prompt = tiny.chat_inputs([[tiny.user("is there a cat?")]])
    torch.testing.assert_close(
        wrapped.generate(**prompt, max_new_tokens=3, do_sample=False),
        wrapped.base_model.model.generate(**prompt, max_new_tokens=3, do_sample=False),
    )


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_projector_finds_the_instruction_of_its_own_call(reentrant):
    """A projector that the user checkpoints, with two forwards before one backward."""
    batches = [tiny.token_inputs([1, 2], seed=1), tiny.token_inputs([2, 1], seed=2)]
    gradients = []
    for checkpointed in (False, True):
        model, _ = patched(with_processor=False)
        projector = model.model.multi_modal_projector
        if checkpointed:
            model.model.multi_modal_projector = CheckpointedProjector(projector, reentrant)
        # Reentrant checkpoints need an input that requires a gradient.
        model.model.vision_tower.requires_grad_(True)
        loss = sum(model(**inputs, labels=all_but_last_ignored(inputs)).loss for inputs in batches)
        loss.backward()
        gradients.append([parameter.grad for parameter in adapter_parameters(projector)])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


class CheckpointedProjector(nn.Module):
    def __init__(self, projector: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.projector, self.reentrant = projector, reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.projector, x, use_reentrant=self.reentrant)


def adapter_parameters(projector: nn.Module):
    return [parameter for name, parameter in projector.named_parameters() if name.startswith("emma.")]


def all_but_last_ignored(inputs: dict[str, Tensor]) -> Tensor:
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -1] = inputs["input_ids"][:, -1]
    return labels


def test_transformers_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for enabled in (False, True):
        model, adapter = patched(with_processor=False)
        adapter.train_only()
        model.train()
        if enabled:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        inputs = tiny.token_inputs([1, 2])
        model(**inputs, labels=all_but_last_ignored(inputs)).loss.backward()
        gradients.append([parameter.grad for parameter in adapter.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("patch_first", [True, False])
def test_a_projector_that_peft_trains_too(patch_first):
    """PEFT trains a copy of the projector, hooks and adapter included."""
    model = tiny.llava()
    inputs = labelled("a red bird")
    original = logits(model, inputs)
    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["multi_modal_projector"])
    if patch_first:
        patch_model(model)
    wrapped = get_peft_model(model, lora)
    if not patch_first:
        patch_model(wrapped)
    adapter = get_adapter(wrapped)
    assert torch.equal(logits(wrapped, inputs), original)
    tiny.train_randomly(adapter.alignment)
    assert (logits(wrapped, inputs) - original).abs().max() > EFFECT
    with adapter.disabled():
        assert torch.equal(logits(wrapped, inputs), original)
    other = labelled("two dogs, and a tree")
    assert torch.equal(image_features(wrapped, inputs), image_features(wrapped, other))
    unpatch_model(wrapped)
    assert torch.equal(logits(wrapped, inputs), original)


def test_a_projector_that_is_replaced_takes_the_adapter_with_it():
    """And the next call says so, instead of answering without it."""
    model = tiny.llava()
    inputs = tiny.token_inputs([1])
    patch_model(model)
    model.model.multi_modal_projector = tiny.llava().model.multi_modal_projector
    for call in (model, model.generate):
        with pytest.raises(PatchError, match="not the one that was patched"):
            call(**inputs)
    logits(model, tiny.token_inputs([0]))


# --------------------------------------------------------------------------------------- life cycle


@pytest.mark.parametrize("projector", [True, False])
def test_unpatching_makes_trainable_again_what_was(projector):
    model = tiny.llava()
    model.model.vision_tower.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    patch_model(model).train_only(projector=projector).train_only()
    unpatch_model(model)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


def test_a_projector_with_lora_cannot_be_saved_as_a_projector():
    model = tiny.llava()
    adapter = patch_model(get_peft_model(model, LoraConfig(r=2, target_modules=["linear_1"])))
    with pytest.raises(PatchError, match="projector"):
        adapter.train_only(projector=True)
    adapter.train_only()


def test_copies_are_patched_and_independent():
    inputs = tiny.token_inputs([1, 2])
    model, adapter = patched(with_processor=False)
    expected = logits(model, inputs)
    generated = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.zero_()
    assert torch.equal(logits(twin, inputs), expected)
    unpatch_model(model)
    assert torch.equal(twin.generate(**inputs, max_new_tokens=3, do_sample=False), generated)
    assert repr(get_adapter(twin))
    unpatch_model(twin)
    assert torch.equal(logits(twin, inputs), logits(model, inputs))


def test_pickled_model_is_patched():
    model, adapter = patched("attention", "custom")
    restored = pickle.loads(pickle.dumps(model))
    inputs = tiny.chat_inputs([[tiny.user("is there a cat?")]])
    assert torch.equal(logits(restored, inputs), logits(model, inputs))
    assert torch.equal(
        restored.generate(**inputs, max_new_tokens=3, do_sample=False),
        model.generate(**inputs, max_new_tokens=3, do_sample=False),
    )
    assert adapter.num_parameters() == get_adapter(restored).num_parameters()


def test_a_patched_model_can_be_collected():
    model, adapter = patched()
    logits(model, tiny.token_inputs([1]))
    alive = weakref.ref(model)
    del model, adapter
    gc.collect()
    assert alive() is None


def test_call_signatures_stay():
    original = tiny.llava()
    model, _ = patched()
    assert inspect.signature(model.generate) == inspect.signature(original.generate)
    assert inspect.signature(model.forward) == inspect.signature(original.forward)
    assert inspect.signature(model.save_pretrained) == inspect.signature(original.save_pretrained)


def test_another_tools_method_on_the_instance_is_kept():
    model = tiny.llava()
    calls = []
    original = model.generate
    model.generate = lambda *args, **kwargs: calls.append("tool") or original(*args, **kwargs)
    tool = model.generate
    patch_model(model)
    inputs = tiny.token_inputs([1])
    model.generate(**inputs, instruction=torch.tensor([[5]]), max_new_tokens=1)
    assert calls == ["tool"]
    unpatch_model(model)
    assert model.generate is tool


def test_patching_twice_is_an_error():
    model, adapter = patched()
    with pytest.raises(PatchError, match="unpatch_model"):
        patch_model(model)
    assert get_adapter(model).num_parameters() == adapter.num_parameters()


def test_what_is_no_image_text_model_is_refused():
    with pytest.raises(UnsupportedModelError, match="wrapper"):
        patch_model(nn.Linear(2, 2))
    with pytest.raises(UnsupportedModelError, match="ForConditionalGeneration"):
        patch_model(tiny.llava().model)


def test_a_failed_patch_leaves_the_model_as_it_was():
    model = tiny.llava()
    before = snapshot(model)
    for config in (EmmaConfig(visual_dim=7), EmmaConfig(num_visual_tokens=9), EmmaConfig(instruction_dim=5)):
        with pytest.raises(ValueError, match="EmmaConfig"):
            patch_model(model, config)
    assert snapshot(model) == before


def test_visual_features_outside_of_a_call_need_a_named_instruction():
    model, adapter = patched(with_processor=False)
    inputs = tiny.token_inputs([1, 1])
    pixels = inputs["pixel_values"]
    with pytest.raises(InstructionError, match=r"adapter\.instruction"):
        model.get_image_features(pixel_values=pixels)
    told = torch.tensor([[31, 41], [32, 42]])
    expected = image_features(model, inputs, instruction=told)
    with torch.no_grad(), adapter.instruction(told):
        direct = torch.stack(tuple(model.get_image_features(pixel_values=pixels).pooler_output))
    torch.testing.assert_close(direct.flatten(0, 1), expected)
    with adapter.disabled():
        model.get_image_features(pixel_values=pixels)
    with (
        pytest.raises(InstructionError, match="3 instructions"),
        adapter.instruction(torch.ones(3, 1, dtype=torch.long)),
    ):
        model.get_image_features(pixel_values=pixels)


def test_a_named_instruction_is_that_of_every_call_in_the_block():
    model, adapter = patched(with_processor=False)
    inputs = tiny.token_inputs([1, 2])
    told, other = torch.tensor([[31, 41], [32, 42]]), torch.tensor([[33], [34]])
    expected, overridden = logits(model, inputs, instruction=told), logits(model, inputs, instruction=other)
    inferred = logits(model, inputs)
    with adapter.instruction(told):
        for _ in range(2):
            assert torch.equal(logits(model, inputs), expected)
        assert torch.equal(logits(model, inputs, instruction=other), overridden)
        torch.testing.assert_close(generate_logits(model, inputs), expected[:, -1], atol=SAME, rtol=0)
    with adapter.instruction(told[:1]):
        assert torch.equal(logits(model, inputs), logits(model, inputs, instruction=told[[0, 0]]))
    with adapter.instruction(told[[0, 1, 0]]), pytest.raises(InstructionError, match="3 instructions for 2 rows"):
        model(**inputs)
    assert torch.equal(logits(model, inputs), inferred)


def test_named_instructions_may_end_in_another_order_than_they_began():
    """As those of asynchronous tasks do."""
    model, adapter = patched(with_processor=False)
    inputs = tiny.token_inputs([1])
    inferred = logits(model, inputs)
    first, second = (adapter.instruction(torch.tensor([[token]])) for token in (31, 32))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(logits(model, inputs), logits(model, inputs, instruction=torch.tensor([[32]])))
    second.__exit__(None, None, None)
    assert torch.equal(logits(model, inputs), inferred)


def test_an_interrupted_call_leaves_no_instruction_for_the_next():
    """PyTorch runs no hooks after an interrupt."""
    model, _ = patched(with_processor=False)
    inputs = tiny.token_inputs([1])
    with torch.no_grad():
        before = model.model(**inputs).last_hidden_state

    def interrupt(*args):
        raise KeyboardInterrupt

    handle = model.model.language_model.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**inputs, instruction=torch.tensor([[31]]))
    handle.remove()
    with torch.no_grad():
        assert torch.equal(model.model(**inputs).last_hidden_state, before)


def test_token_ids_beyond_the_vocabulary_are_an_error():
    model, _ = patched(with_processor=False)
    with pytest.raises(InstructionError, match="vocabulary"):
        model(**tiny.token_inputs([1]), instruction=torch.tensor([[10**6]]))


def test_a_call_that_fails_leaves_nothing_for_the_next(monkeypatch):
    model, _ = patched(with_processor=False)
    inputs = tiny.token_inputs([1])

    def fail(*args, **kwargs):
        raise OSError("out of luck")

    for call in (model, model.generate):
        handle = model.model.vision_tower.register_forward_pre_hook(fail)
        with pytest.raises(OSError, match="out of luck"):
            call(**inputs, instruction=torch.tensor([[5, 6]]))
        handle.remove()
        with pytest.raises(InstructionError):
            model.get_image_features(pixel_values=inputs["pixel_values"])
    assert torch.equal(logits(model, inputs), logits(patched(with_processor=False)[0], inputs))


def test_inner_model_can_be_called_directly():
    model, _ = patched(with_processor=False)
    inputs = tiny.token_inputs([1, 2])
    with torch.no_grad():
        hidden = model.model(**inputs).last_hidden_state
        assert torch.equal(model.lm_head(hidden), logits(model, inputs))
        told = {"instruction": torch.tensor([[5], [6]])}
        assert torch.equal(
            model.lm_head(model.model(**inputs, **told).last_hidden_state), logits(model, inputs, **told)
        )


def test_positional_arguments_work():
    model, _ = patched(with_processor=False)
    inputs = tiny.token_inputs([1, 2])
    with torch.no_grad():
        by_position = model(inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"]).logits
    assert torch.equal(by_position, logits(model, inputs))
    told = torch.tensor([[5], [6]])
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    assert torch.equal(
        model.generate(inputs["input_ids"], **rest, instruction=told, max_new_tokens=2, do_sample=False),
        model.generate(**inputs, instruction=told, max_new_tokens=2, do_sample=False),
    )


def test_threads_do_not_mix_instructions():
    model, adapter = patched(with_processor=False)
    batches = [tiny.token_inputs(images, seed=number) for number, images in enumerate(([1, 2], [2], [1, 1, 0], [3]))]
    expected = [logits(model, inputs) for inputs in batches]
    with adapter.disabled():
        plain = [logits(model, inputs) for inputs in batches]
    wrong = []

    def work(number: int) -> None:
        for turn in range(8):
            if (turn + number) % 3 == 0:
                with adapter.disabled():
                    same = torch.allclose(logits(model, batches[number]), plain[number], atol=1e-6)
            else:
                same = torch.allclose(logits(model, batches[number]), expected[number], atol=1e-6)
            if not same:
                wrong.append((number, turn))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_handle_tells_what_it_is(clip_folder):
    model, adapter = patched("attention", "clip", clip_folder=clip_folder)
    own = adapter.num_parameters()
    assert own == sum(parameter.numel() for parameter in adapter.parameters())
    total = sum(parameter.numel() for parameter in model.parameters())
    text = repr(adapter)
    for part in ("'llava'", "'attention'", str(clip_folder), f"{own:,}", f"{own / total:.3%} of the model"):
        assert part in text


def test_autocast_runs_and_keeps_dtypes(fusion):
    model, adapter = patched(fusion, with_processor=False)
    inputs = tiny.token_inputs([1, 2])
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**inputs, labels=all_but_last_ignored(inputs)).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype == torch.float32 for p in adapter.parameters())


def test_adapter_weights_stay_float32_beside_a_half_precision_model():
    model = tiny.llava().to(torch.bfloat16)
    adapter = patch_model(model)
    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.float32}
    inputs = tiny.token_inputs([1])
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    model(**inputs, labels=all_but_last_ignored(inputs)).loss.backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())


def test_rows_without_images_may_supervise_everything():
    """A text-only row of a mixed batch has no instruction to leak."""
    for with_processor in (True, False):
        model, _ = patched(with_processor=with_processor)
        inputs = tiny.token_inputs([1, 0])
        labels = all_but_last_ignored(inputs)
        labels[1] = inputs["input_ids"][1]
        model.train()(**inputs, labels=labels).loss.backward()


def test_a_full_text_beside_a_short_one_changes_nothing_for_the_short_one():
    """The padding of an encoder that doesn't encode padding stays masked for ``linear``, however long the batch."""
    model, _ = patched("linear", "custom")
    inputs = tiny.token_inputs([1, 1])
    short, full = "why?", "x" * WordHashEncoder.max_instruction_tokens
    together = last_logits(model, inputs, instruction=[short, full])
    alone = last_logits(model, tiny.select_row(inputs, [1, 1], 0), instruction=[short])
    torch.testing.assert_close(together[:1], alone, atol=SAME, rtol=0)
