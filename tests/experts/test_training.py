"""What is trained of experts and by which gradients: plain, checkpointed, in half precision, by Trainer."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainingArguments

from emma_adapter import ConfigError, DataError, add_vision_expert, load_vision_experts, patch_model
from tests.experts.small import (
    ROWS,
    WITH_EXPERTS,
    features,
    learn_router,
    pixels_of,
    same,
    stock_with,
    used_mlps,
    with_expert,
)
from tests.support.budget import budget
from tests.support.zoo import ZOO, answered

IGNORED = -100
NAMES = budget(("llava", "qwen3_vl", "qwen2_5_vl"), WITH_EXPERTS)
names = pytest.mark.parametrize("name", NAMES)


def batch_of(name: str, count: int = len(ROWS)):
    return answered(ZOO[name], ROWS[:count], "a red bird.")


def labels_for(experts, batch) -> list[str]:
    """The second and fourth row's images to the expert."""
    with experts.watched() as report:
        sizes = [len(one) for one in features(experts.model, batch)]
    if len(sizes) == len(report.images):
        per_row = [1] * len(ROWS)
        if len(sizes) > len(ROWS):
            placeholder = experts.model.config.image_token_id
            tokens = (batch["input_ids"] == placeholder).sum(1)
            ends = torch.tensor(sizes).cumsum(0)
            assert ends[-1] == tokens.sum()
            rows = torch.searchsorted(tokens.cumsum(0), ends)
            per_row = rows.bincount(minlength=len(ROWS)).tolist()
    else:
        per_row = [len(report.images) * size // sum(sizes) for size in sizes]
    return [label for number, label in zip(per_row, ["original", "stem"] * 2, strict=True) for _ in range(number)]


def gradients(parameters) -> list:
    return [None if p.grad is None else p.grad.clone() for p in parameters]


@names
def test_gradients_are_those_of_a_stock_model_with_the_experts_weights(name):
    """Of each row with the weights that computed it: the expert's, and the original's."""
    batch = batch_of(name)
    experts = with_expert(name, model=ZOO[name].model().double())
    batch = {n: v.double() if v.is_floating_point() else v for n, v in batch.items()}
    learn_router(experts, labels_for(experts, batch), pixels_of(batch))
    model = experts.model
    other, stock = stock_with(experts), ZOO[name].model().double()
    for one in (model, other, stock):
        one.set_experts_implementation("eager")  # a mixture's usual products take no float64
    model.zero_grad()
    other.zero_grad()
    model(**batch).loss.backward()
    total = (batch["labels"][:, 1:] != IGNORED).sum()
    mine = {
        "stem": model.emma_experts.of("stem"),
        "original": [p for mlp in used_mlps(model, experts.layers) for p in mlp.parameters()],
    }
    for expert, oracle, rows in (("stem", other, slice(0, None, 2)), ("original", stock, slice(1, None, 2))):
        labels = batch["labels"].clone()
        labels[rows] = IGNORED
        oracle(**{**batch, "labels": labels}).loss.backward()
        share = (labels[:, 1:] != IGNORED).sum() / total
        theirs = [p for mlp in used_mlps(oracle, experts.layers) for p in mlp.parameters()]
        assert len(theirs) == len(mine[expert]) > 0
        for own, want in zip(mine[expert], theirs, strict=True):
            assert want.grad.abs().max() > 0
            torch.testing.assert_close(own.grad, want.grad * share, atol=1e-12, rtol=1e-8)
    assert all(p.grad is None for p in model.emma_experts.router.values())


@pytest.mark.parametrize("reentrant", [False, True])
@names
def test_checkpointed_gradients_are_the_same(name, reentrant):
    """Backward runs outside of the block that the call was made in, and after another call."""
    batch = batch_of(name)
    experts = with_expert(name)
    learn_router(experts, labels_for(experts, batch), pixels_of(batch))
    experts.model.train()
    own = experts.model.emma_experts.of("stem")
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            experts.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        for choice in (None, "stem"):
            experts.model.zero_grad()
            with experts.routed(choice):
                loss = experts.model(**batch).loss
            with experts.routed("original"), torch.no_grad():
                experts.model(**batch)
            loss.backward()
            found.append(gradients(own))
    for plain, checkpointed in zip(found[:2], found[2:], strict=True):
        for one, other in zip(plain, checkpointed, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(found[0][0], found[1][0])


def test_a_whole_tower_that_is_computed_again_goes_the_way_it_went():
    batch = batch_of("qwen3_vl")
    experts = with_expert("qwen3_vl").train_only("stem")
    experts.unfreeze()
    inner = experts.model.model

    def loss(again: bool):
        def encode(pixels):
            return inner.get_image_features(pixels, batch["image_grid_thw"]).pooler_output[0]

        with experts.routed("stem"):
            made = checkpoint(encode, pixels, use_reentrant=False) if again else encode(pixels)
        return made.square().sum()

    found = []
    for again in (False, True):
        pixels = batch["pixel_values"].clone().requires_grad_()
        experts.model.zero_grad()
        loss(again).backward()
        found.append(gradients(experts.model.emma_experts.of("stem")))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_train_only_freezes_everything_else_and_sends_every_image():
    experts = with_expert("llava", trained=False)
    add_vision_expert(experts.model, "maps")
    before = {name: p.requires_grad for name, p in experts.model.named_parameters()}
    batch = ZOO["llava"].batch(ROWS)

    def trainable() -> set[str]:
        return {name for name, p in experts.model.named_parameters() if p.requires_grad}

    assert experts.train_only("maps") is not None
    assert {name.rsplit(".", 1)[1].split("/")[0] for name in trainable()} == {"maps"}
    with experts.watched() as report:
        features(experts.model, batch)
    assert report.counts == {"maps": len(ROWS)}
    experts.train_only(router=True)
    assert trainable() == {f"emma_experts.router.{n}/{part}" for n in ("stem", "maps") for part in ("weight", "bias")}
    with experts.watched() as report:
        features(experts.model, batch)
    assert report.counts == {"original": len(ROWS)}
    experts.unfreeze()
    assert {name: p.requires_grad for name, p in experts.model.named_parameters()} == before
    for wrong in ({}, {"expert": "stem", "router": True}, {"expert": "steam"}):
        with pytest.raises(ConfigError):
            experts.train_only(**wrong)


def test_an_expert_learns_and_the_original_does_not():
    batch = batch_of("qwen3_vl")
    experts = with_expert("qwen3_vl", trained=False)
    stock = features(ZOO["qwen3_vl"].model(), batch)
    experts.train_only("stem")
    optimizer = torch.optim.AdamW(experts.parameter_groups(1e-2))
    losses = []
    for _ in range(8):
        loss = experts.model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01
    experts.unfreeze()
    assert all(same(features(experts.model, batch), stock))


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "llava_next"])
def test_the_routers_loss_is_cross_entropy_of_the_router_alone(name):
    batch = ZOO[name].batch(ROWS)
    experts = with_expert(name)
    # It is computed before the projector, where an adapter of the first paper would ask for an instruction.
    patch_model(experts.model, processor=ZOO[name].processor())
    experts.train_only(router=True)
    labels = ["stem", "original", "original", "stem"]
    loss = experts.router_loss(labels=labels, **batch)
    with experts.watched() as report:
        experts.model(**batch)
    shares = [image.probabilities[label] for image, label in zip(report.images, labels, strict=True)]
    want = -torch.tensor(shares).log().mean()
    torch.testing.assert_close(loss, want, atol=1e-5, rtol=1e-5)
    loss.backward()
    moved = {name for name, p in experts.model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert moved == {"emma_experts.router.stem/weight", "emma_experts.router.stem/bias"}
    with pytest.raises(ConfigError, match="steam"):
        experts.router_loss(labels=["steam"] * 4, **batch)
    for labels, given in ((["stem"], batch), ([], {})):
        with pytest.raises(DataError, match="labels for"):
            experts.router_loss(labels=labels, **given)


def test_experts_of_a_half_precision_model_are_trained_in_float32():
    batch = batch_of("qwen3_vl")
    batch = {n: v.bfloat16() if v.is_floating_point() else v for n, v in batch.items()}
    stock = ZOO["qwen3_vl"].model().bfloat16()
    experts = with_expert("qwen3_vl", trained=False, model=ZOO["qwen3_vl"].model().bfloat16())
    assert {p.dtype for p in experts.parameters()} == {torch.float32}
    want = stock(**batch).logits
    assert torch.equal(experts.model(**batch).logits, want)
    experts.train_only("stem")
    assert torch.equal(experts.model(**batch).logits, want)
    before = [p.detach().clone() for p in experts.model.emma_experts.of("stem")]
    # In bfloat16, steps of the paper's rate would round to nothing.
    optimizer = torch.optim.AdamW(experts.parameter_groups(4e-6))
    experts.model(**batch).loss.backward()
    optimizer.step()
    assert not any(map(torch.equal, before, experts.model.emma_experts.of("stem")))


def test_autocast_computes_what_it_does_for_a_stock_model():
    batch = batch_of("llava")
    experts = with_expert("llava")
    learn_router(experts, ["stem", "original"] * 2, pixels_of(batch))
    stock, other = ZOO["llava"].model(), stock_with(experts)
    with torch.autocast("cpu", torch.bfloat16):
        mixed, first, second = (features(model, batch) for model in (experts.model, stock, other))
    assert same(mixed, first) == [False, True] * 2 and same(mixed, second) == [True, False] * 2


def test_parameter_groups_hold_what_is_trainable():
    experts = with_expert("llava")
    groups = experts.parameter_groups(4e-6, router_lr=1e-4, weight_decay=0.1)
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(4e-6, 0.1), (4e-6, 0.0), (1e-4, 0.0)]
    assert {id(p) for group in groups for p in group["params"]} == set(map(id, experts.parameters()))
    assert all(p.ndim == 2 for p in groups[0]["params"])
    [router] = experts.train_only(router=True).parameter_groups(1e-4)
    assert len(router["params"]) == 2 and router["lr"] == 1e-4
    with pytest.raises(ConfigError, match="router_lr"):
        experts.parameter_groups(1e-4, router_lr=-1)


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, number: int) -> int:
        return number % len(ROWS)


def trainer(folder, experts, **changes) -> Trainer:
    settings = {
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
        **changes,
    }
    return Trainer(
        experts.model,
        TrainingArguments(**settings),
        train_dataset=Rows(),
        data_collator=lambda rows: answered(ZOO["qwen3_vl"], [ROWS[number] for number in rows], "a red bird."),
    )


def test_trainer_trains_saves_and_resumes_exactly(tmp_path):
    experts = with_expert("qwen3_vl", trained=False).train_only("stem")
    base = {name: value.clone() for name, value in experts.model.state_dict().items() if "emma" not in name}
    before = [p.detach().clone() for p in experts.model.emma_experts.of("stem")]
    trainer(tmp_path, experts, gradient_checkpointing=True, bf16=True).train()
    assert all(torch.equal(value, experts.model.state_dict()[name]) for name, value in base.items())
    assert not any(map(torch.equal, before, experts.model.emma_experts.of("stem")))
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert saved and all(name.startswith("emma_experts.") for name in saved)
    again = with_expert("qwen3_vl", trained=False).train_only("stem")
    resumed = trainer(tmp_path, again, gradient_checkpointing=True, bf16=True)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(map(torch.equal, experts.parameters(), again.parameters()))
    last = load_vision_experts(ZOO["qwen3_vl"].model(), tmp_path / "checkpoint-4")
    assert all(map(torch.equal, experts.parameters(), last.parameters()))


def test_a_trained_base_is_saved_with_the_experts(tmp_path):
    experts = with_expert("qwen3_vl", trained=False)
    trainer(tmp_path, experts, max_steps=1, save_steps=1).train()
    saved = set(load_file(tmp_path / "checkpoint-1" / "model.safetensors"))
    assert any(name.startswith("emma_experts.") for name in saved) and any("blocks" in name for name in saved)
