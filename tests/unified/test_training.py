"""Losses and gradients, the plain loop, Trainer, resuming, checkpointing, autocast."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from emma_adapter import EmmaUnified, UnifiedConfig, load_unified, patch_model
from emma_adapter.errors import ConfigError, DataError, ShapeError
from emma_adapter.unified.flow import training_times
from emma_adapter.unified.losses import dropped, latent_loss
from emma_adapter.unified.reading import read_rows
from tests.support import tiny
from tests.support.zoo import ZOO, Row
from tests.unified.small import autoencoder, drawn, picture, seeded, unified


def pictures(count: int, seed: int = 0, side: int = 64) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=seeded(seed))


# ------------------------------------------------------------------------------------ the loss


def test_the_loss_is_its_formula():
    """On the velocities of a field that predicts zero: the mean square of noise - x0, whatever the prompt is."""
    config = UnifiedConfig(decoupling=2, prompt_dropout=0.0, noise_draws=3, timestep_density="uniform")
    adapter = unified("qwen3_vl", config, trained=False)
    targets = [*pictures(1), *pictures(1, 1, 32)]
    generator, twin = seeded(4), seeded(4)
    loss = adapter.loss(["a", "b"], targets, generator=generator)
    training_times(2, 3, "uniform", 3.0, generator=twin, device=torch.device("cpu"))
    noise = torch.randn(2, 3, 4, 8, generator=twin)
    latents = [adapter.encode_images(one[None])[0].flatten(1).mT for one in targets]
    first = (noise[0] - latents[0]).square().mean()
    second = (noise[1, :, :1] - latents[1]).square().mean()
    torch.testing.assert_close(loss, (first + second) / 2)


def test_several_draws_are_the_mean_of_single_ones():
    """The draws of one sequence don't see each other: the gradient of each is that of a sequence of its own."""
    from emma_adapter.unified.drawing import VelocityField, grid_of

    adapter = unified("gemma3", UnifiedConfig(decoupling=2))
    with torch.no_grad():
        prefix = read_rows(adapter.model, adapter._state, [("a bird", ()), ("two", ())])
        grid = grid_of(2, 2, torch.device("cpu")).expand(2, -1, -1)
        real = torch.ones(2, 4, dtype=torch.bool)
        x, t = torch.randn(2, 3, 4, 8), torch.rand(2, 3)
        together = VelocityField(adapter.model, adapter._state, prefix, grid, real, 3)(x, t)
        alone = VelocityField(adapter.model, adapter._state, prefix, grid, real, 1)
        for draw in range(3):
            single = alone(x[:, draw : draw + 1], t[:, draw : draw + 1])
            torch.testing.assert_close(together[:, draw : draw + 1], single, atol=1e-5, rtol=1e-5)


def test_latents_that_an_edit_changes_weigh_more():
    reference = picture(1, 64, 64)
    target = as_tensor(reference)
    target[:, :, :32, :32] = 0
    losses = {}
    for weight in (1.0, 4.0):
        config = UnifiedConfig(decoupling=2, prompt_dropout=0.0, changed_weight=weight)
        adapter = unified("qwen3_vl", config, trained=False)
        losses[weight] = adapter.loss(["x"], target, [reference], generator=seeded(1))
    training_times(1, 1, "logit_normal", 3.0, generator=(twin := seeded(1)), device=torch.device("cpu"))
    error = (torch.randn(1, 1, 4, 8, generator=twin)[0, 0] - adapter.encode_images(target)[0].flatten(1).mT).square()
    each = error.mean(1)
    before, after = (adapter.encode_images(one)[0].flatten(1) for one in (as_tensor(reference), target))
    change = (before - after).square().mean(0)
    weights = 1 + 3 * (change > change.max() / 2).float()
    assert 0 < (weights > 1).sum() < 4
    torch.testing.assert_close(losses[1.0], each.mean())
    torch.testing.assert_close(losses[4.0], (each * weights).sum() / weights.sum())


def as_tensor(image):
    return torch.from_numpy(np.array(image.convert("RGB"), dtype=np.float32) / 255).permute(2, 0, 1)[None]


def test_latents_take_the_place_of_pictures():
    adapter = unified("qwen3_vl", UnifiedConfig(decoupling=2))
    targets = pictures(2)
    latents = adapter.encode_images(targets)
    with torch.no_grad():
        want = adapter.loss(["a", "b"], targets, generator=seeded(0))
        assert torch.equal(adapter.loss(["a", "b"], latents, generator=seeded(0)), want)
    torch.testing.assert_close(
        adapter.decode_latents(latents), autoencoder().decode(latents / 0.5).sample.div(2).add(0.5).clamp(0, 1)
    )


def test_measured_latents_have_no_mean_and_unit_deviation():
    adapter = unified("qwen3_vl", UnifiedConfig(decoupling=2))
    adapter.measure_latents(pictures(6))
    latents = adapter.encode_images(pictures(6)).movedim(1, 0).flatten(1)
    torch.testing.assert_close(latents.mean(1), torch.zeros(8), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std(1), torch.ones(8), atol=1e-4, rtol=0)
    again = adapter.decode_latents(adapter.encode_images(pictures(6)))
    other = unified("qwen3_vl", UnifiedConfig(decoupling=2))
    torch.testing.assert_close(again, other.decode_latents(other.encode_images(pictures(6))), atol=1e-4, rtol=0)


def test_dropout_leaves_what_guidance_compares():
    rows = [("text", ("picture",))] * 2000 + [("text", ())] * 2000
    made = dropped(rows, 0.2, seeded(0))
    assert set(made) == {("text", ("picture",)), ("", ("picture",)), ("", ()), ("text", ())}
    shares = [made[:2000].count(row) / 2000 for row in (("", ("picture",)), ("", ()))]
    assert shares == pytest.approx([0.1, 0.1], abs=0.03)
    assert made[2000:].count(("", ())) / 2000 == pytest.approx(0.2, abs=0.03)
    assert dropped(rows, 0.0) == rows


def test_only_the_branch_is_trained_and_a_frozen_base_keeps_no_graph():
    adapter = unified("qwen3_vl", UnifiedConfig(decoupling=2))
    model = adapter.model
    graphs = []
    handle = model.model.language_model.layers[0].register_forward_hook(
        lambda module, args, output: graphs.append(output.requires_grad)
    )
    adapter.train_only()
    adapter.loss(["a"], pictures(1)).backward()
    adapter.loss(["a"], pictures(1), [picture(1)]).backward()
    handle.remove()
    assert graphs == [False, True]
    assert all(parameter.grad is not None for parameter in adapter.parameters())
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        f"emma_unified.default.{name}" for name, _ in adapter.named_parameters()
    }
    adapter.unfreeze()
    adapter.loss(["a"], pictures(1)).backward()
    layer = model.model.language_model.layers[0]
    assert layer.self_attn.q_proj.weight.grad.abs().max() > 0


def test_groups_and_numbers():
    adapter = unified("llava", UnifiedConfig(decoupling=2))
    groups = adapter.parameter_groups(lr=1e-3, weight_decay=0.1)
    assert sum(p.numel() for group in groups for p in group["params"]) == adapter.num_parameters()
    assert [(g["lr"], g["weight_decay"], {p.ndim for p in g["params"]}) for g in groups] == [
        (1e-3, 0.1, {2}),
        (1e-3, 0.0, {0, 1}),
    ]
    with pytest.raises(ConfigError, match="lr"):
        adapter.parameter_groups(lr=-1.0)


def test_a_few_steps_learn_to_draw_what_is_asked_for():
    """Two prompts, two latents: after training, each prompt's drawing is nearer to its own."""
    config = UnifiedConfig(
        decoupling="full", noise_draws=8, prompt_dropout=0.0, timestep_density="uniform", time_shift=1.0
    )
    adapter = unified("qwen3_vl", config, trained=False)
    adapter.train_only()
    latents = torch.randn(2, 8, 2, 2, generator=seeded(0))
    prompts = ["a red bird on a green tree", "two dogs"]
    optimizer = torch.optim.AdamW(adapter.parameter_groups(lr=1e-2))
    generator = seeded(1)
    for _ in range(200):
        optimizer.zero_grad()
        loss = adapter.loss(prompts, latents, generator=generator)
        loss.backward()
        optimizer.step()
    made = drawn(adapter, prompts, height=64, width=64, num_inference_steps=10, guidance_scale=1.0, generator=seeded(3))
    distances = torch.cdist(made.flatten(1), latents.flatten(1))
    assert distances.argmin(1).tolist() == [0, 1]
    assert distances.diagonal().mean() < 0.85 * distances.flip(1).diagonal().mean()


# ------------------------------------------------------------------------------------ checkpointing, precision


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["qwen3_vl", "gemma3", "llava"])
def test_gradient_checkpointing_changes_no_gradient(name, reentrant):
    gradients = []
    for checkpointing in (False, True):
        adapter = unified(name, UnifiedConfig(decoupling=2))
        adapter.train_only()
        model = adapter.model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.requires_grad_(reentrant)
        model.emma_unified.default.requires_grad_(True)
        loss = adapter.loss(["a dog", "two"], pictures(2), [picture(1), None], generator=seeded(0))
        loss.backward()
        gradients.append([loss.detach(), *(parameter.grad for parameter in adapter.parameters())])
        assert all(
            getattr(m, "gradient_checkpointing", checkpointing) == checkpointing
            for m in model.model.language_model.layers
        )
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_checkpointing_recomputes_the_layers_that_draw(monkeypatch):
    adapter = unified("qwen3_vl", UnifiedConfig(decoupling=2))
    adapter.train_only()
    adapter.model.train().gradient_checkpointing_enable({"use_reentrant": False})
    calls = []
    kind = type(adapter.model.model.language_model.layers[0].mlp)
    real = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: calls.append(torch.is_grad_enabled()) or real(self, x))
    loss = adapter.loss(["a"], pictures(1))
    before = len(calls)
    loss.backward()
    assert calls[:before].count(True) == 2 and len(calls) - before == 2


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_autocast_and_half_precision_are_near_float32(base):
    want = unified("qwen3_vl", UnifiedConfig(decoupling=2)).loss(["a"], pictures(1), generator=seeded(0))
    adapter = unified("qwen3_vl", UnifiedConfig(decoupling=2), model=ZOO["qwen3_vl"].model().to(base))
    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16, enabled=base is torch.float32):
        loss = adapter.loss(["a"], pictures(1), generator=seeded(0))
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, want, atol=0.02, rtol=0.02)


# ------------------------------------------------------------------------------------ calls of the model, Trainer


def test_a_call_with_targets_adds_the_flow_loss():
    adapter = unified("qwen3_vl", UnifiedConfig(decoupling=2, prompt_dropout=0.0))
    model, rows = (
        adapter.model,
        [{"prompt": "a dog", "target": picture(1, 64, 64)}, {"prompt": "two", "target": picture(2, 64, 64)}],
    )
    batch = adapter.collator()(rows)
    with torch.no_grad():
        torch.manual_seed(0)
        flow = model(**batch).loss
        torch.manual_seed(0)
        targets = torch.cat([as_tensor(row["target"]) for row in rows])
        torch.testing.assert_close(flow, adapter.loss(["a dog", "two"], targets))
        inputs = ZOO["qwen3_vl"].batch([Row("a dog", ((56, 56),)), Row("two")])
        labels = {"labels": inputs["input_ids"]}
        language = model(**inputs, **labels)
        torch.manual_seed(0)
        flow = model(**inputs, target_pixel_values=targets).loss
        torch.manual_seed(0)
        both = model(**inputs, **labels, target_pixel_values=targets)
        torch.testing.assert_close(both.loss, language.loss + flow)
        assert torch.equal(both.logits, language.logits)
        assert torch.equal(model(**inputs, **labels, target_pixel_values=None).loss, language.loss)
        as_tuple = model(**inputs, target_pixel_values=targets, return_dict=False)
        assert as_tuple[0].ndim == 0


def test_rows_of_any_kind_are_collated(tmp_path):
    adapter = unified("qwen3_vl", UnifiedConfig(decoupling=2, prompt_dropout=0.0, changed_weight=1.0))
    for number in range(3):
        picture(number, 70, 50).save(tmp_path / f"{number}.png")
    rows = [
        {"prompt": "a dog", "target": "0.png"},
        {"prompt": "make it blue", "image": "1.png", "target": picture(5, 90, 60)},
        {"prompt": "join them", "image": ["1.png", picture(6)], "target": "2.png"},
    ]
    batch = adapter.collator(size=(32, 64), folder=tmp_path)(rows)
    assert batch["target_pixel_values"].shape == batch["source_pixel_values"].shape == (3, 3, 32, 64)
    assert torch.equal(batch["source_pixel_values"][0], batch["target_pixel_values"][0])
    with torch.no_grad():
        torch.manual_seed(0)
        got = adapter.model(**batch).loss
        torch.manual_seed(0)
        images = [None, picture(1, 70, 50), [picture(1, 70, 50), picture(6)]]
        want = adapter.loss([row["prompt"] for row in rows], batch["target_pixel_values"], images)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("row", "size", "error", "says"),
    [
        ({"target": "0.png"}, None, DataError, '"prompt"'),
        ({"prompt": "a"}, None, DataError, '"target"'),
        ({"prompt": " ", "target": "0.png"}, None, DataError, "a prompt must be"),
        ({"prompt": "a", "target": "none.png"}, None, DataError, r"none\.png"),
        ({"prompt": "a", "target": "0.png"}, None, ShapeError, "take 64 x 64"),
        ({"prompt": "a", "target": "0.png"}, (50, 64), ShapeError, "take 64 x 64"),
        ({"prompt": "a", "target": 7}, None, DataError, "PIL image"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path, row, size, error, says):
    picture(0, 70, 50).save(tmp_path / "0.png")
    adapter = unified("qwen3_vl", UnifiedConfig(decoupling=2))
    with pytest.raises(error, match=says):
        adapter.collator(size=size, folder=tmp_path)([row])


@pytest.mark.parametrize(
    ("targets", "images", "error", "says"),
    [
        (pictures(1), None, DataError, "1 targets for 2 prompts"),
        (pictures(2) * 255, None, DataError, r"outside of \[0, 1\]"),
        (pictures(2) * float("nan"), None, DataError, "NaN"),
        (pictures(2, side=48), None, ShapeError, "take 64 x 64"),
        (torch.rand(2, 4, 64, 64), None, ShapeError, r"\[3, H, W\]"),
        (torch.zeros(2, 3, 64, 64, dtype=torch.uint8), None, ShapeError, "uint8"),
        (pictures(2), [None], DataError, "1 entries"),
        (["a.png", "b.png"], None, DataError, "PIL image"),
    ],
)
def test_targets_that_cannot_be_used(targets, images, error, says):
    adapter = unified("qwen3_vl", UnifiedConfig(decoupling=2))
    with pytest.raises(error, match=says):
        adapter.loss(["a", "b"], targets, images)


def arguments(folder, **changes):
    made = {
        "output_dir": str(folder),
        "max_steps": 4,
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": [],
        "remove_unused_columns": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    return TrainingArguments(**{**made, **changes})


@pytest.fixture
def jsonl(tmp_path):
    lines = []
    for number in range(8):
        picture(number, 64, 64).save(tmp_path / f"{number}.png")
        row = {"prompt": f"a {number}", "target": f"{number}.png"}
        lines.append(json.dumps(row | ({"image": "0.png"} if number % 2 else {})))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    return tmp_path


def trainer(jsonl, adapter, **changes):
    rows = [json.loads(line) for line in (jsonl / "rows.jsonl").read_text().splitlines()]
    return Trainer(
        adapter.model,
        arguments(jsonl / "out", **changes),
        data_collator=adapter.collator(size=(64, 64), folder=jsonl),
        train_dataset=rows,
    )


def test_trainer_trains_saves_and_resumes_exactly(jsonl):
    adapter = unified("qwen3_vl", UnifiedConfig(decoupling=2)).train_only()
    base = {name: value.clone() for name, value in adapter.model.state_dict().items() if "emma" not in name}
    before = [parameter.detach().clone() for parameter in adapter.parameters()]
    trainer(jsonl, adapter).train()
    assert all(torch.equal(value, adapter.model.state_dict()[name]) for name, value in base.items())
    assert not any(map(torch.equal, before, adapter.parameters()))
    checkpoint = jsonl / "out" / "checkpoint-2"
    assert all(name.startswith("emma_unified.") for name in load_file(checkpoint / "model.safetensors"))
    again = unified("qwen3_vl", UnifiedConfig(decoupling=2)).train_only()
    trainer(jsonl, again).train(resume_from_checkpoint=str(checkpoint))
    for one, other in zip(adapter.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    processor = ZOO["qwen3_vl"].processor()
    last = load_unified(
        ZOO["qwen3_vl"].model(), jsonl / "out" / "checkpoint-4", processor=processor, autoencoder=autoencoder()
    )
    assert all(map(torch.equal, last.parameters(), adapter.parameters()))


def test_trainer_in_bfloat16_with_checkpointing_and_evaluation(jsonl):
    adapter = unified("qwen3_vl", UnifiedConfig(decoupling=2)).train_only()
    seen = []
    kind = type(adapter.model.model.language_model.layers[0].mlp)
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, output: seen.append(output.dtype) if isinstance(module, kind) else None
    )
    made = trainer(jsonl, adapter, bf16=True, gradient_checkpointing=True, save_strategy="no", max_steps=2)
    made.train()
    handle.remove()
    assert set(seen) == {torch.bfloat16}
    made.eval_dataset = made.train_dataset
    # As its name isn't one that transformers knows.
    made.label_names = ["target_pixel_values"]
    assert made.evaluate()["eval_loss"] > 0


def test_what_else_is_trained_is_saved_too(jsonl):
    adapter = unified("qwen3_vl", UnifiedConfig(decoupling=2))
    trainer(jsonl, adapter, max_steps=1, save_steps=1).train()
    names = set(load_file(jsonl / "out" / "checkpoint-1" / "model.safetensors"))
    assert any(name.startswith("emma_unified.") for name in names) and any(
        "lm_head" in n or "embed" in n for n in names
    )


def test_a_patched_model_is_trained_to_draw(jsonl):
    adapter = unified("qwen3_vl", UnifiedConfig(decoupling=2))
    tiny.train_randomly(patch_model(adapter.model, processor=ZOO["qwen3_vl"].processor()).alignment)
    adapter.train_only()
    trainer(jsonl, adapter, max_steps=1, save_strategy="no").train()
    assert isinstance(EmmaUnified(adapter.model), EmmaUnified)


def test_a_call_drops_prompts_as_the_loss_does(tmp_path):
    """With every prompt dropped, the loss is that of the empty prompt, of rows with pictures half without them."""
    adapter = unified("qwen3_vl", UnifiedConfig(decoupling=2, prompt_dropout=0.999999, changed_weight=1.0))
    rows = [{"prompt": "a", "target": picture(n, 64, 64), "image": picture(9)} for n in range(3)]
    rows.append({"prompt": "a long one that is not read", "target": picture(4, 64, 64)})
    batch = adapter.collator()(rows)
    torch.manual_seed(1)
    got = adapter.model(**batch).loss
    torch.manual_seed(1)
    u = torch.rand(4)
    assert (u[:3] < 0.5).any() and not (u[:3] < 0.5).all()
    images = [None if number < 0.5 else picture(9) for number in u[:3].tolist()]
    state = adapter._state
    prefix = read_rows(adapter.model, state, [("", () if one is None else (one,)) for one in images] + [("", ())])
    want = latent_loss(
        adapter.model, state, prefix, list(adapter.encode_images(batch["target_pixel_values"])), None, None
    )
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
