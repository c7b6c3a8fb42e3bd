"""``generate(generation_mode="image")`` and ``pipeline("any-to-any")``, against ``generate_images``."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers import pipeline

from emma_adapter import ConfigError, DataError, EmmaConfig, UnifiedConfig, patch_model, unify_model, unpatch_model
from tests.support import tiny
from tests.support.zoo import ZOO
from tests.unified.small import autoencoder, picture, seeded

PROMPTS = ["a dog", "make it a red bird"]
OPTIONS = {"height": 64, "width": 96, "num_inference_steps": 2, "guidance_scale": 3.0}
#: Whose processors make one piece of a picture, and those that cut it into tiles.
WHOLE, CUT = ("qwen3_vl", "llava", "gemma3", "mistral3"), ("llava_next", "internvl", "idefics3")


def drawing(name: str):
    """A model that draws something else for each prompt, and its processor."""
    processor, model = ZOO[name].processor(), ZOO[name].model()
    return made_to_draw(model, processor), processor


def made_to_draw(model, processor):
    adapter = unify_model(model, UnifiedConfig(decoupling=2), processor=processor, autoencoder=autoencoder())
    tiny.train_randomly(model.emma_unified, scale=0.05)
    return adapter.set_progress_bar_config(disable=True)


def inputs_of(processor, prompts, pictures=None):
    """As people make them, by the chat template."""
    shown = pictures or [[]] * len(prompts)
    talks = [
        [{"role": "user", "content": [*({"type": "image", "image": p} for p in own), {"type": "text", "text": text}]}]
        for own, text in zip(shown, prompts, strict=True)
    ]
    return processor.apply_chat_template(
        talks,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        processor_kwargs={"padding": True},
    )


@pytest.mark.parametrize("name", [*WHOLE, *CUT])
def test_words_are_drawn_as_by_generate_images_bit_for_bit(name):
    adapter, processor = drawing(name)
    found = adapter.model.generate(
        **inputs_of(processor, PROMPTS), generation_mode="image", generator=seeded(0), max_new_tokens=3, **OPTIONS
    )
    wanted = adapter.generate_images(PROMPTS, generator=seeded(0), output_type="pt", **OPTIONS).images
    assert torch.equal(found, wanted) and not torch.equal(found[0], found[1])


@pytest.mark.parametrize("name", WHOLE)
def test_edits_are_those_of_generate_images(name):
    """Also where rows have different numbers of pictures, of different sizes, padded on either side."""
    adapter, processor = drawing(name)
    pictures = [[picture(1, 56, 84)], [picture(2, 56, 56), picture(3, 84, 56)]]
    options = {**OPTIONS, "image_guidance_scale": 1.5, "num_images_per_prompt": 2}
    wanted = adapter.generate_images(PROMPTS, pictures, generator=seeded(0), output_type="pt", **options).images
    for side in ("left", "right"):
        processor.tokenizer.padding_side = side
        inputs = inputs_of(processor, PROMPTS, pictures)
        found = adapter.model.generate(**inputs, generation_mode="image", generator=seeded(0), **options)
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=0)
    plain = adapter.generate_images(PROMPTS, generator=seeded(0), output_type="pt", **OPTIONS).images
    assert (plain - wanted[::2]).abs().max() > 1e-3


@pytest.mark.parametrize("name", CUT)
def test_of_tiles_guidance_is_refused_and_the_rest_drawn(name):
    adapter, processor = drawing(name)
    inputs = inputs_of(processor, PROMPTS[:1], [[picture(1, 112, 56)]])
    with pytest.raises(DataError, match=r"unified\.generate_images\(prompt, image=.*guidance_scale=1"):
        adapter.model.generate(**inputs, generation_mode="image", **OPTIONS)
    options = {**OPTIONS, "guidance_scale": 1.0, "image_guidance_scale": 1.0}
    found = adapter.model.generate(**inputs, generation_mode="image", generator=seeded(0), **options)
    wanted = adapter.generate_images(
        PROMPTS[:1], [picture(1, 112, 56)], generator=seeded(0), output_type="pt", **options
    )
    torch.testing.assert_close(found, wanted.images, atol=2e-5, rtol=0)


def test_a_size_is_taken_from_the_picture():
    adapter, processor = drawing("qwen3_vl")
    inputs = inputs_of(processor, PROMPTS[:1], [[picture(1, 112, 56)]])
    made = adapter.model.generate(**inputs, generation_mode="image", num_inference_steps=1, output_type="latent")
    assert made.shape[-2:] == (2, 4)


@pytest.mark.filterwarnings("ignore")
def test_a_pipeline_draws_and_answers():
    adapter, processor = drawing("qwen3_vl")
    model = adapter.model
    stock = pipeline("any-to-any", model=ZOO["qwen3_vl"].model(), processor=ZOO["qwen3_vl"].processor())
    drawer = pipeline("any-to-any", model=model, processor=processor)
    talk = [
        {"role": "user", "content": [{"type": "image", "image": picture(1, 56, 56)}, {"type": "text", "text": "a dog"}]}
    ]
    answer = {"max_new_tokens": 3, "return_full_text": False}
    assert drawer(talk, **answer)[0]["generated_text"] == stock(talk, **answer)[0]["generated_text"]
    options = {"generator": seeded(0), **OPTIONS}
    [made] = drawer(talk, generation_mode="image", generate_kwargs=options)
    wanted = adapter.generate_images("a dog", picture(1, 56, 56), generator=seeded(0), **OPTIONS).images[0]
    assert made["generated_image"].size == (96, 64)
    difference = torch.tensor(list(made["generated_image"].tobytes())) - torch.tensor(list(wanted.tobytes()))
    assert difference.abs().max() <= 1
    assert len(drawer([talk, talk], generation_mode="image", generate_kwargs={**options, "generator": None})) == 2
    assert drawer(talk, **answer)[0]["generated_text"] == stock(talk, **answer)[0]["generated_text"]
    with pytest.raises(ValueError, match="audio"):
        drawer(talk, generation_mode="audio")


def test_nothing_of_it_is_saved_or_left(tmp_path):
    adapter, processor = drawing("qwen3_vl")
    model, fresh = adapter.model, ZOO["qwen3_vl"].processor()
    assert model.output_modalities == ("text", "image")
    ids = inputs_of(processor, PROMPTS[:1])
    inputs_of(fresh, PROMPTS[:1])
    model.generate(**ids, generation_mode="image", **OPTIONS)
    for folder, one in (("drew", processor), ("fresh", fresh)):
        one.save_pretrained(tmp_path / folder)
    files = {path.name: path.read_bytes() for path in (tmp_path / "drew").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "fresh").iterdir()}
    assert not hasattr(pickle.loads(pickle.dumps(model.config)), "output_modalities")
    twin = copy.deepcopy(model)
    unpatch_model(model)
    assert model.output_modalities == ("text",) and "generate" not in vars(model)
    assert vars(processor).keys() == vars(fresh).keys()
    with pytest.raises(ValueError, match="generation_mode"):
        model.generate(**ids, generation_mode="image")
    assert len(twin.generate(**ids, generation_mode="image", **OPTIONS)) == 1


@pytest.mark.parametrize("drawn_first", [True, False])
def test_beside_an_adapter(drawn_first):
    """Each prompt is read with its own instruction, that of guidance too."""
    entry = ZOO["llava"]
    processor, model = entry.processor(), entry.model()
    for step in (0, 1):
        if drawn_first is (step == 0):
            adapter = made_to_draw(model, processor)
        else:
            tiny.train_randomly(patch_model(model, EmmaConfig(), processor=processor).alignment)
    pictures = [[picture(1, 56, 56)], [picture(2, 56, 56)]]
    inputs = inputs_of(processor, PROMPTS, pictures)
    found = model.generate(**inputs, generation_mode="image", generator=seeded(0), **OPTIONS)
    wanted = adapter.generate_images(PROMPTS, pictures, generator=seeded(0), output_type="pt", **OPTIONS).images
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=0)


def test_what_has_no_use_is_named():
    adapter, processor = drawing("llava")
    ids = inputs_of(processor, PROMPTS)
    for given, words in (
        ({"heigth": 64}, "heigth"),
        ({"streamer": object()}, "streamer"),
        ({"input_ids": None}, "input_ids"),
        ({"past_key_values": ()}, "past_key_values"),
    ):
        with pytest.raises(DataError, match=words):
            adapter.model.generate(**{**ids, **given}, generation_mode="image", **OPTIONS)
    with pytest.raises(ConfigError, match="audio"):
        adapter.model.generate(**ids, generation_mode="audio")
    text = {"max_new_tokens": 2, "do_sample": False}
    assert torch.equal(
        adapter.model.generate(**ids, generation_mode="text", **text), ZOO["llava"].model().generate(**ids, **text)
    )
