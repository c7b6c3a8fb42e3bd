"""Drawing: batches, seeds, sizes, guidance, output; and a base that nothing of it changes."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from emma_adapter import EmmaUnified, UnifiedConfig, patch_model, unpatch_model
from emma_adapter.errors import ConfigError, DataError, ShapeError, UnsupportedModelError
from tests.support import tiny
from tests.support.budget import some
from tests.support.zoo import ZOO, Row
from tests.unified.small import autoencoder, drawn, picture, seeded, unified
from tests.unified.test_layers import FAMILIES, prompt_ids


@pytest.fixture(scope="module")
def qwen() -> EmmaUnified:
    return unified("qwen3_vl", UnifiedConfig(decoupling=3))


# ------------------------------------------------------------------------------------ the base


def answers(model, inputs):
    """All that a user can see of the base: logits, hidden states, tokens, names, stored positions."""
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True)
        tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        deltas = getattr(model.model, "rope_deltas", None)
        inputs = {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"])}
        embedded = model(**inputs).logits
    found = [output.logits, *output.hidden_states, tokens, embedded]
    return found + ([] if deltas is None else [deltas])


HALVES = [(name, torch.float16) for name in ("qwen3_vl", "llava", "gemma3")]


@pytest.mark.parametrize(("name", "dtype"), [*some(1, FAMILIES, [torch.float32, torch.bfloat16]), *HALVES])
def test_the_base_is_the_same_bits_whatever_is_drawn_or_trained(name, dtype):
    entry = ZOO[name]
    model = entry.model().to(dtype)
    if name == "gemma3":
        # Pictures of noise through random weights are beyond what half precision holds.
        model.model.multi_modal_projector.mm_input_projection_weight.data.mul_(0.1)
    inputs = entry.batch([Row("what is in it?", ((56, 56),)), Row("is there a cat in the picture?", ((56, 84),))])
    inputs = {n: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for n, v in inputs.items()}
    before = answers(model, inputs)
    names, hooks = list(model.state_dict()), hook_counts(model)
    adapter = unified(name, UnifiedConfig(decoupling=2), model=model)

    def check():
        assert all(map(torch.equal, before, answers(model, inputs)))
        assert [key for key in model.state_dict() if not key.startswith("emma_unified.")] == names

    check()
    pictures = [picture(4, 84, 56), None]
    made = drawn(adapter, ["make it blue", "a dog"], pictures, image_guidance_scale=1.5, generator=seeded(0))
    assert bool(torch.isfinite(made).all())
    check()
    adapter.train_only()
    optimizer = torch.optim.SGD(adapter.parameter_groups(lr=0.1))
    loss = adapter.loss(["make it blue", "a dog"], torch.rand(2, 3, 64, 64), pictures, generator=seeded(1))
    loss.backward()
    optimizer.step()
    assert bool(torch.isfinite(loss)) and all(p.grad is None for n, p in model.named_parameters() if "emma" not in n)
    check()
    unpatch_model(model)
    check()
    assert hook_counts(model) == hooks and not any("emma" in name for name, _ in model.named_parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def hook_counts(model) -> list[int]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_state_dict_hooks", "_backward_hooks")
    return [len(getattr(module, kind)) for module in model.modules() for kind in kinds]


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_stored_positions_survive_a_conversation_that_is_interrupted_by_a_drawing(name):
    """Qwen-VL keeps positions of the last prompt on the model, for the tokens that follow it."""
    adapter = unified(name, UnifiedConfig(decoupling=3))
    model, entry = adapter.model, ZOO[name]
    inputs = entry.batch([Row("what is it?", ((84, 56),))])
    follow = {"input_ids": torch.tensor([[30]]), "use_cache": True}

    def talk(between):
        with torch.no_grad():
            first = model(**inputs, use_cache=True)
            between()
            cache = first.cache if "cache" in first else first.past_key_values
            name = "cache" if "cache" in first else "past_key_values"
            return model(**follow, **{name: cache}).logits

    alone = talk(lambda: None)
    stored = []

    def draw():
        stored.append(model.model.rope_deltas)
        drawn(adapter, ["a dog", "two"], [picture(1, 56, 112), None], image_guidance_scale=1.5)
        stored.append(model.model.rope_deltas)

    assert torch.equal(alone, talk(draw))
    # Not even for a moment, in which another thread could read it.
    assert stored[0] is stored[1] is not None


def test_others_get_their_answers_while_pictures_are_drawn(qwen):
    model, entry = qwen.model, ZOO["qwen3_vl"]
    inputs = entry.batch([Row("what is it?", ((84, 56),))])
    want_picture = drawn(qwen, "a dog", picture(1), generator=seeded(3), num_inference_steps=4)
    want = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    failures = []

    def draw_all():
        for _ in range(4):
            made = drawn(qwen, "a dog", picture(1), generator=seeded(3), num_inference_steps=4)
            if not torch.equal(made, want_picture):
                failures.append("picture")

    threads = [threading.Thread(target=draw_all) for _ in range(2)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if not torch.equal(model.generate(**inputs, max_new_tokens=6, do_sample=False), want):
            failures.append("answer")
    assert not failures


# ------------------------------------------------------------------------------------ batches and seeds


@pytest.mark.parametrize("name", ["qwen3_vl", "llava_next", "gemma3"])
def test_a_batch_equals_the_single_calls(name):
    adapter = unified(name, UnifiedConfig(decoupling=3))
    prompts = ["a red five at the top left of it", "two", "make it blue and the others green"]
    images = [picture(2, 84, 56), None, [picture(3), picture(4, 56, 84)]]
    settings = {"guidance_scale": 3.0, "image_guidance_scale": 1.5, "num_images_per_prompt": 2}
    batch = drawn(adapter, prompts, images, generator=[seeded(n) for n in range(6)], **settings)
    for number, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
        own = [seeded(2 * number), seeded(2 * number + 1)]
        single = drawn(adapter, prompt, None if image is None else [image], generator=own, **settings)
        torch.testing.assert_close(batch[2 * number : 2 * number + 2], single, atol=2e-5, rtol=1e-5)
    assert (batch[0] - batch[1]).abs().max() > 0.1


def test_one_generator_gives_pictures_their_noise_one_after_another(qwen):
    several = drawn(qwen, "a dog", num_images_per_prompt=3, generator=seeded(7))
    generator = seeded(7)
    for one in several:
        torch.testing.assert_close(drawn(qwen, "a dog", generator=generator)[0], one, atol=1e-5, rtol=1e-5)


def test_latents_are_the_noise(qwen):
    noise = torch.randn(1, 8, 2, 3, generator=seeded(5))
    assert torch.equal(drawn(qwen, latents=noise), drawn(qwen, generator=seeded(5)))
    assert torch.equal(drawn(qwen, generator=seeded(5)), drawn(qwen, generator=seeded(5)))
    torch.manual_seed(5)
    assert torch.equal(drawn(qwen, latents=noise), drawn(qwen))


def test_a_padded_prompt_draws_what_it_draws_alone(qwen):
    """Which row of a batch is the longest doesn't matter."""
    alone = drawn(qwen, "two", generator=seeded(1))
    padded = drawn(
        qwen, ["two", "a red five at the top left, and nothing else in it"], generator=[seeded(1), seeded(2)]
    )
    torch.testing.assert_close(padded[:1], alone, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------ guidance, against formulas


def test_one_step_of_guided_drawing_is_its_formula(qwen):
    """From single branches, each drawn without guidance."""
    noise = torch.randn(1, 8, 2, 3, generator=seeded(5))

    def velocity(prompt, image):
        branch = {"guidance_scale": 1.0, "image_guidance_scale": 1.0, "num_inference_steps": 1, "latents": noise}
        return noise - drawn(qwen, prompt, image, **branch)  # x0 = noise - 1 · v

    own = picture(2, 84, 56)
    both, negative = velocity("make it blue", own), "ugly"
    image, none = velocity(negative, own), velocity(negative, None)
    wanted = noise - (none + 1.7 * (image - none) + 4.0 * (both - image))
    scales = {"guidance_scale": 4.0, "image_guidance_scale": 1.7, "num_inference_steps": 1, "latents": noise}
    torch.testing.assert_close(
        drawn(qwen, "make it blue", own, negative_prompt=negative, **scales), wanted, atol=2e-5, rtol=1e-5
    )


def test_reference_pictures_and_their_latents_take_part(qwen):
    noise = {"latents": torch.randn(1, 8, 2, 3, generator=seeded(5))}
    first, second = drawn(qwen, "x", picture(1), **noise), drawn(qwen, "x", picture(2), **noise)
    assert (first - second).abs().max() > 1e-3
    weight = qwen.model.emma_unified.default.fusion["latents"]
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.zero_()
        without = drawn(qwen, "x", picture(1), **noise)
        weight.copy_(kept)
    assert (first - without).abs().max() > 1e-4


# ------------------------------------------------------------------------------------ the call


def test_output_types(qwen):
    settings = {"generator": seeded(0), "height": 64, "width": 96}
    tensor = drawn(qwen, output_type="pt", **settings)
    assert tensor.shape == (1, 3, 64, 96) and tensor.min() >= 0 and tensor.max() <= 1
    array = drawn(qwen, output_type="np", **settings | {"generator": seeded(0)})
    [image] = drawn(qwen, output_type="pil", **settings | {"generator": seeded(0)})
    np.testing.assert_allclose(array[0], tensor[0].permute(1, 2, 0).numpy())
    assert image.size == (96, 64)
    assert np.abs(np.asarray(image) / 255 - array[0]).max() <= 0.5 / 255 + 1e-6


def test_the_size_of_an_edit_is_its_pictures_or_asked_for(qwen):
    [image] = qwen.generate_images("x", picture(1, 100, 60), num_inference_steps=1).images
    assert image.size == (96, 64)
    [image] = qwen.generate_images("x", picture(1, 100, 60), num_inference_steps=1, width=32).images
    assert image.size == (32, 64)


def test_a_callback_sees_and_steers_every_step(qwen):
    seen = []

    def note(handle, number, time, values):
        seen.append((type(handle), number, round(time, 3), tuple(values["latents"].shape)))
        return {"latents": torch.zeros_like(values["latents"])} if number == 1 else None

    made = drawn(qwen, num_inference_steps=2, callback_on_step_end=note)
    assert seen == [(EmmaUnified, 0, 1.0, (1, 8, 2, 3)), (EmmaUnified, 1, 0.75, (1, 8, 2, 3))]
    assert made.abs().max() == 0


def test_a_drawing_can_be_cancelled_and_leaves_nothing(qwen):
    before = {name: id(value) for name, value in vars(qwen.model.model).items()}

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        drawn(qwen, "x", picture(1), callback_on_step_end=stop)
    assert {name: id(value) for name, value in vars(qwen.model.model).items()} == before


def test_the_progress_bar_can_be_switched_off(qwen, capfd):
    drawn(qwen)
    assert capfd.readouterr().err == ""
    qwen.set_progress_bar_config(desc="drawing", mininterval=0)
    drawn(qwen)
    assert "drawing" in capfd.readouterr().err
    qwen.set_progress_bar_config(disable=True)


def test_memory_does_not_grow_with_the_steps(qwen):
    def tensors() -> int:
        gc.collect()
        return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())

    counts = []
    drawn(qwen, num_inference_steps=3, callback_on_step_end=lambda *_: counts.append(tensors()))
    assert max(counts[1:]) == min(counts[1:])


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_solvers_agree_in_the_limit(qwen, solver):
    noise = torch.randn(1, 8, 2, 3, generator=seeded(5))
    fine = drawn(qwen, latents=noise, num_inference_steps=120, guidance_scale=1.0)
    coarse = drawn(qwen, latents=noise, num_inference_steps=60, guidance_scale=1.0, solver=solver)
    torch.testing.assert_close(coarse, fine, atol=0.05, rtol=0)


def maskless(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Attention that takes padding, but no mask of four dimensions, as FlashAttention does."""
    assert attention_mask is None or attention_mask.ndim == 2
    length = key.shape[2]
    seen = torch.ones(query.shape[2], length, dtype=torch.bool).tril(length - query.shape[2])
    if attention_mask is not None:
        seen = seen & attention_mask.bool()[:, None, None] | torch.eye(length, dtype=torch.bool)[-query.shape[2] :]
    made = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=seen, scale=scaling, enable_gqa=True
    )
    return made.transpose(1, 2), None


def test_every_attention_of_the_base_gives_the_same_pictures():
    """What is drawn goes through an attention that takes masks, whichever the base uses."""
    transformers.AttentionInterface.register("maskless", maskless)
    transformers.AttentionMaskInterface.register("maskless", ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"])
    pictures = []
    for attention in ("sdpa", "maskless", "eager"):
        model = ZOO["llava"].model()
        model.model.language_model.set_attn_implementation(attention)
        adapter = unified("llava", UnifiedConfig(decoupling=3), model=model)
        pictures.append(drawn(adapter, ["a dog", "a red five at the top"], generator=[seeded(0), seeded(1)]))
    for other in pictures[1:]:
        torch.testing.assert_close(other, pictures[0], atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------ life of the model


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_of_the_model_draws_the_same_and_is_its_own(how):
    adapter = unified("qwen3_vl", UnifiedConfig(decoupling=2))
    if how == "deepcopy":
        model = copy.deepcopy(adapter.model)
    elif how == "pickle":
        model = pickle.loads(pickle.dumps(adapter.model))
    else:
        file = io.BytesIO()
        torch.save(adapter.model, file)
        file.seek(0)
        model = torch.load(file, weights_only=False)
    twin = EmmaUnified(model)
    want = drawn(adapter, "x", picture(1), generator=seeded(0))
    twin.set_progress_bar_config(disable=True)
    assert torch.equal(drawn(twin, "x", picture(1), generator=seeded(0)), want)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    assert torch.equal(drawn(adapter, "x", picture(1), generator=seeded(0)), want)
    assert not torch.equal(drawn(twin, "x", picture(1), generator=seeded(0)), want)
    unpatch_model(model)
    assert torch.equal(drawn(adapter, "x", picture(1), generator=seeded(0)), want)


def test_understanding_is_fused_where_it_is_asked_for():
    entry = ZOO["qwen3_vl"]
    model = entry.model()
    inputs = entry.batch([Row("what is it?", ((56, 84),)), Row("and this?")])
    with torch.no_grad():
        before = model(**inputs).logits
        adapter = unified("qwen3_vl", UnifiedConfig(decoupling=2, fuse_understanding=True), model=model, trained=False)
        assert torch.equal(model(**inputs).logits, before)
        tiny.train_randomly(model.emma_unified.default.fusion, 0.1)
        fused = model(**inputs).logits
        with adapter.disabled():
            assert torch.equal(model(**inputs).logits, before)
    assert not torch.equal(fused[0], before[0])
    torch.testing.assert_close(fused[1], before[1])
    unpatch_model(model)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)


@pytest.mark.parametrize("first", ["patch", "unify"])
def test_both_papers_on_one_model_and_each_comes_off_alone(first):
    entry = ZOO["qwen3_vl"]
    model = entry.model()
    inputs = entry.batch([Row("what is it?", ((56, 84),))])

    def patch():
        tiny.train_randomly(patch_model(model, processor=entry.processor()).alignment, 0.3)

    def unify():
        unified("qwen3_vl", UnifiedConfig(decoupling=2), model=model)

    with torch.no_grad():
        plain = model(**inputs).logits
        for put in (patch, unify) if first == "patch" else (unify, patch):
            put()
        aligned = model(**inputs).logits
        assert not torch.equal(aligned, plain)
        assert drawn(EmmaUnified(model), "x", picture(1)).isfinite().all()
        assert torch.equal(model(**inputs).logits, aligned)
        EmmaUnified(model).remove()
        assert torch.equal(model(**inputs).logits, aligned)
        assert not any(name.startswith("emma_unified") for name in model.state_dict())
        unify()
        unpatch_model(model)
        assert torch.equal(model(**inputs).logits, plain)
    assert not any("emma" in name for name, _ in model.named_modules())


# ------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"prompt": ""}, DataError, "a prompt must be"),
        ({"prompt": ["a", "  "]}, DataError, "a prompt must be"),
        ({"prompt": []}, DataError, "non-empty list"),
        ({"prompt": 5}, DataError, "a text or a"),
        ({"height": 65}, ShapeError, "take 64 x 96"),
        ({"width": 0}, ShapeError, "take 64 x 32"),
        ({"height": 63.5}, ShapeError, "multiples"),
        ({"num_inference_steps": 0}, ConfigError, "num_inference_steps"),
        ({"num_inference_steps": 2.0}, ConfigError, "num_inference_steps"),
        ({"num_images_per_prompt": 0}, ConfigError, "num_images_per_prompt"),
        ({"guidance_scale": -1}, ConfigError, "guidance_scale"),
        ({"image_guidance_scale": float("nan")}, ConfigError, "image_guidance_scale"),
        ({"solver": "magic"}, ConfigError, "solver"),
        ({"output_type": "jpg"}, ConfigError, "output_type"),
        ({"generator": [seeded(0), seeded(1)]}, ConfigError, "2 generators for 1 pictures"),
        ({"latents": torch.zeros(1, 8, 3, 2)}, ShapeError, r"\[1, 8, 2, 3\]"),
        ({"negative_prompt": ["a", "b"]}, DataError, "negative_prompt"),
        ({"image": [None, None]}, DataError, "2 entries of reference pictures for 1 prompts"),
        ({"image": "picture.png"}, DataError, "PIL.Image.open"),
        ({"prompt": "what is <|image_pad|>?"}, DataError, "stands for a picture"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_mistake_is_explained_and_leaves_nothing(qwen, settings, error, says):
    before = drawn(qwen, generator=seeded(0))
    with pytest.raises(error, match=says):
        drawn(qwen, **settings)
    assert torch.equal(drawn(qwen, generator=seeded(0)), before)


def test_a_prompt_beyond_the_context_is_refused(qwen, monkeypatch):
    text = qwen.model.config.text_config
    length = len(prompt_ids(qwen, ("a red five", ())))
    monkeypatch.setattr(text, "max_position_embeddings", length + 6)
    drawn(qwen, height=64, width=96)
    with pytest.raises(DataError, match="context of"):
        drawn(qwen, height=64, width=128)


def test_a_prompt_beyond_a_sliding_window_is_refused():
    """Of Gemma 3, whose prompt and picture together must fit."""
    model = ZOO["gemma3"].model()
    model.config.text_config.sliding_window = 24
    adapter = unified("gemma3", UnifiedConfig(decoupling=2), model=model)
    drawn(adapter, "two", height=32, width=32, guidance_scale=1.0)
    for settings in ({"height": 128, "width": 128}, {"prompt": "a red five at the top left and nothing else in it"}):
        with pytest.raises(UnsupportedModelError, match="window"):
            drawn(adapter, **{"prompt": "two", "height": 32, "width": 32, **settings})


def test_a_damaged_picture_is_named(qwen, tmp_path):
    file = io.BytesIO()
    tiny.picture(0).resize((64, 64)).save(file, "PNG")
    (tmp_path / "broken.png").write_bytes(file.getvalue()[:200])
    with pytest.raises(DataError, match=r"broken\.png"):
        drawn(qwen, "x", Image.open(tmp_path / "broken.png"))


def test_the_autoencoder_is_where_nothing_saves_it(qwen):
    assert not any(parameter is own for own in autoencoder().parameters() for parameter in qwen.model.parameters())
    assert all(not parameter.requires_grad for parameter in autoencoder().parameters())
