"""What goes wrong around drawing, and long lives: threads, kills, cancelled calls, broken autoencoders, sizes, soak."""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from emma_adapter import EmmaUnified, UnifiedConfig, unify_model, unpatch_model
from emma_adapter.errors import AutoencoderError, DataError
from emma_adapter.unified.checkpoint import CONFIG_NAME, WEIGHTS_NAME
from tests.support.budget import SEED, budget
from tests.support.zoo import ZOO, Row
from tests.unified.small import autoencoder, drawn, picture, seeded, unified

CONFIG = UnifiedConfig(decoupling=2)


@pytest.fixture(scope="module")
def qwen() -> EmmaUnified:
    return unified("qwen3_vl", CONFIG)


def footprint(model: torch.nn.Module) -> list[object]:
    """What a call could leave on a model: attributes, hooks, gradients, modes."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")
    return [
        (name, sorted(vars(module)), [len(getattr(module, kind)) for kind in kinds], module.training)
        for name, module in model.named_modules()
    ] + [(name, p.requires_grad, p.grad is None) for name, p in model.named_parameters()]


# ------------------------------------------------------------------------------------ cancelled and failing calls


def stopping(monkeypatch, adapter, where, error):
    """Settings of a call that ends with ``error`` in one of its parts."""

    def stop(*_, **__):
        raise error

    if where == "callback":
        return {"callback_on_step_end": stop}
    if where == "layer":
        monkeypatch.setattr(adapter.model.model.language_model.layers[-1].mlp.down_proj, "forward", stop)
    elif where == "tower":
        monkeypatch.setattr(adapter.model.model.visual.blocks[-1], "forward", stop)
    else:
        monkeypatch.setattr(adapter._state.coder.module, where, stop)
    return {}


@pytest.mark.parametrize("where", ["callback", "encode", "decode", "layer", "tower"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_call_that_is_cut_off_leaves_nothing(qwen, monkeypatch, where, error):
    settings = {"output_type": "pt", "image_guidance_scale": 1.5}
    want = drawn(qwen, "x", picture(1), generator=seeded(3), **settings)
    answer = qwen.model(**ZOO["qwen3_vl"].batch([Row()])).logits
    before = footprint(qwen.model)
    with monkeypatch.context() as patch, pytest.raises(error):
        drawn(qwen, "x", picture(1), **settings, **stopping(patch, qwen, where, error))
    assert footprint(qwen.model) == before and torch.is_grad_enabled()
    assert torch.equal(drawn(qwen, "x", picture(1), generator=seeded(3), **settings), want)
    assert torch.equal(qwen.model(**ZOO["qwen3_vl"].batch([Row()])).logits, answer)


@pytest.mark.parametrize("where", ["encode", "layer", "tower"])
def test_a_training_call_that_is_cut_off_leaves_nothing(qwen, monkeypatch, where):
    batch = qwen.collator()([{"prompt": "x", "target": picture(1, 64, 64), "image": picture(2)}])
    plain = ZOO["qwen3_vl"].batch([Row()])

    def both():
        torch.manual_seed(0)
        return qwen.model(**batch).loss, qwen.model(**plain)

    want, answer = both()
    with monkeypatch.context() as patch:
        stopping(patch, qwen, where, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            qwen.model(**batch)
    # The next call has no targets: none of those that were cut off may be added to it.
    assert qwen.model(**plain).loss is None
    again, after = both()
    assert torch.equal(again, want) and torch.equal(after.logits, answer.logits)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["encode", "decode"])
def test_an_autoencoder_that_makes_no_numbers_is_named(qwen, monkeypatch, method, value):
    coder = qwen._state.coder.module
    real = getattr(coder, method)

    def broken(x):
        made = real(x)
        name = "latent" if method == "encode" else "sample"
        getattr(made, name)[..., -1, -1] = value
        return made

    with monkeypatch.context() as patch:
        patch.setattr(coder, method, broken)
        with pytest.raises(AutoencoderError, match="NaN or infinite"):
            drawn(qwen, "x", picture(1), output_type="pil")
        if method == "encode":
            with pytest.raises(AutoencoderError, match="NaN or infinite"):
                qwen.loss("x", torch.rand(1, 3, 64, 64))
            batch = qwen.collator()([{"prompt": "x", "target": picture(1, 64, 64)}])
            with pytest.raises(AutoencoderError, match="NaN or infinite"):
                qwen.model(**batch)
    assert qwen.model(**ZOO["qwen3_vl"].batch([Row()])).loss is None
    assert drawn(qwen, "x", picture(1)).isfinite().all()


# ------------------------------------------------------------------------------------ sizes


def test_no_picture_and_sixty_four(qwen):
    with pytest.raises(DataError, match="non-empty"):
        drawn(qwen, [])
    with pytest.raises(DataError):
        qwen.loss([], torch.rand(0, 3, 64, 64))
    small = {"height": 32, "width": 32, "num_inference_steps": 1}
    prompts = [f"a {number % 7}" for number in range(64)]
    images = [picture(number % 3) if number % 2 else None for number in range(64)]
    made = drawn(qwen, prompts, images, generator=[seeded(n) for n in range(64)], **small)
    assert made.shape == (64, 8, 1, 1)
    for number in (0, 31, 63):
        one = None if images[number] is None else [images[number]]
        alone = drawn(qwen, prompts[number], one, generator=seeded(number), **small)
        torch.testing.assert_close(made[number : number + 1], alone, atol=2e-5, rtol=1e-5)
    loss = qwen.loss(prompts, torch.rand(64, 3, 32, 32), generator=seeded(0))
    assert bool(loss.isfinite())
    # Sixty-four reference pictures of one prompt.
    assert drawn(qwen, "x", [[picture(n % 3) for n in range(64)]], **small).isfinite().all()


def test_a_prompt_of_two_thousand_tokens(qwen, monkeypatch):
    monkeypatch.setattr(qwen.model.config.text_config, "max_position_embeddings", 4096)
    long = "two " * 2000
    settings = {"height": 32, "width": 32, "num_inference_steps": 1}
    alone = drawn(qwen, long, generator=seeded(0), **settings)
    other = drawn(qwen, long + "five", generator=seeded(0), **settings)
    assert not torch.equal(alone, other)
    both = drawn(qwen, ["two", long], generator=[seeded(1), seeded(0)], **settings)
    torch.testing.assert_close(both[1:], alone, atol=2e-5, rtol=1e-5)
    short = drawn(qwen, "two", generator=seeded(1), **settings)
    torch.testing.assert_close(both[:1], short, atol=2e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------ threads


def test_threads_that_draw_edit_and_train_do_not_meet(qwen):
    """Each thread's own prompts, pictures and losses, and answers beside them."""
    plain = ZOO["qwen3_vl"].batch([Row("what is it?", ((56, 84),))])
    batch = qwen.collator()([{"prompt": "x", "target": picture(1, 64, 64), "image": picture(2)}])

    def loss_of(number):
        return qwen.loss("x", torch.full((1, 3, 64, 64), number / 12), picture(number), generator=seeded(number))

    def answer(_):
        output = qwen.model(**plain)
        assert output.loss is None
        return output.logits

    jobs = {
        "draw": lambda number: drawn(qwen, f"a {number}", generator=seeded(number)),
        "edit": lambda number: drawn(qwen, f"a {number}", picture(number), generator=seeded(number)),
        "pictures": lambda number: drawn(qwen, f"a {number}", generator=seeded(number), output_type="pt"),
        "loss": loss_of,
        "answer": answer,
        # Its noise is the process's, which threads share: that it is there, and no other call's.
        "call": lambda _: qwen.model(**batch).loss.isfinite(),
    }
    todo = [(name, number) for number in range(budget(2, 12)) for name in jobs]
    want = {(name, number): jobs[name](number).detach() for name, number in todo}
    random.Random(SEED).shuffle(todo)
    with ThreadPoolExecutor(4) as pool:
        for key, got in zip(todo, pool.map(lambda key: jobs[key[0]](key[1]).detach(), todo), strict=True):
            assert torch.equal(got, want[key]), key
    assert threading.active_count() < 20


# ------------------------------------------------------------------------------------ kills


@pytest.mark.nightly
def test_a_save_that_is_killed_at_any_moment_is_the_old_one_or_the_new_one(tmp_path):
    from emma_adapter import load_unified

    adapter = unified("qwen3_vl", CONFIG)
    processor, chance = ZOO["qwen3_vl"].processor(), random.Random(SEED)
    adapter.save_pretrained(tmp_path)
    started = time.monotonic()
    adapter.save_pretrained(tmp_path)
    duration = time.monotonic() - started
    value = 0.0
    for round_ in range(budget(10, 60)):
        value_after = float(round_ + 1)
        if (child := os.fork()) == 0:
            try:
                with torch.no_grad():
                    for parameter in adapter.parameters():
                        parameter.fill_(value_after)
                adapter.save_pretrained(tmp_path)
            finally:
                os._exit(0)
        time.sleep(chance.uniform(0, 1.5 * duration))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        model = ZOO["qwen3_vl"].model()
        found = load_unified(model, tmp_path, processor=processor, autoencoder=autoencoder())
        firsts = {float(p.detach().flatten()[0]) for p in found.parameters()}
        whole = all(bool((p == p.flatten()[0]).all()) for p in found.parameters())
        if value_after in firsts:
            value = value_after
        assert value == 0.0 or (firsts == {value} and whole)
    adapter.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["README.md", CONFIG_NAME, WEIGHTS_NAME]
    shutil.rmtree(tmp_path)


# ------------------------------------------------------------------------------------ soak


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.nightly
def test_a_long_life_of_drawing_training_and_removing_grows_nothing():
    entry = ZOO["qwen3_vl"]
    model, processor, coder = entry.model(), entry.processor(), autoencoder()
    plain = entry.batch([Row("what is it?", ((56, 84),))])
    before, footprint_before, memory = model(**plain).logits, footprint(model), []
    hooks = len(coder._forward_hooks)
    for number in range(budget(40, 400)):
        adapter = unify_model(model, CONFIG, processor=processor, autoencoder=coder)
        adapter.set_progress_bar_config(disable=True)
        drawn(adapter, ["a", f"b {number % 5}"], [picture(number % 3), None], output_type="pil")
        adapter.train_only()
        optimizer = torch.optim.AdamW(adapter.parameter_groups(lr=1e-3))
        adapter.loss("x", torch.rand(1, 3, 64, 64), picture(1)).backward()
        optimizer.step()
        (adapter.remove if number % 2 else lambda: unpatch_model(model))()
        memory.append(resident())
    assert footprint(model) == footprint_before and len(coder._forward_hooks) == hooks
    assert torch.equal(model(**plain).logits, before)
    quarter = len(memory) // 4
    assert max(memory[-quarter:]) < max(memory[quarter : 2 * quarter]) * 1.02
