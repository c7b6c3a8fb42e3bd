"""What training adds to the embeddings of prompts, as NEFTune does, never reaches the instruction."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

from emma_adapter import patch_model
from tests.support import tiny
from tests.support.budget import budget


def losses(folder, model, **options) -> list[float]:
    """Of a few steps of Trainer, in which nothing but the noise changes: the rate is zero."""
    inputs = tiny.token_inputs([1, 2], padding_side="right")
    rows = [tiny.select_row(inputs, [1, 2], row) for row in (0, 1)] * 2
    rows = [{**row, "labels": row["input_ids"].clone().index_fill(1, torch.tensor([0, 1]), -100)} for row in rows]
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=1, num_train_epochs=1, learning_rate=0.0, logging_steps=1,
        report_to=[], save_strategy="no", use_cpu=True, remove_unused_columns=False, disable_tqdm=True, seed=7,
        **options,
    )  # fmt: skip
    trainer = Trainer(model, arguments, data_collator=lambda batch: batch[0], train_dataset=rows)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("with_lora", budget([True], [False, True]))
def test_neftune_gives_the_losses_of_the_plain_model(tmp_path, with_lora):
    """Bit for bit: the untrained adapter takes no random numbers of the prompt's."""

    def made(patched: bool) -> nn.Module:
        model = tiny.llava()
        if patched:
            patch_model(model)
        return get_peft_model(model, LoraConfig(target_modules=["q_proj"])) if with_lora else model

    plain = losses(tmp_path, made(False), neftune_noise_alpha=5.0)
    assert plain == losses(tmp_path, made(True), neftune_noise_alpha=5.0)
    assert plain != losses(tmp_path, made(True))


def instructions(adapter) -> list[torch.Tensor]:
    """What the adapter is told, call by call."""
    seen: list[torch.Tensor] = []
    adapter.alignment.register_forward_pre_hook(lambda _, args: seen.append(args[1].clone()))
    return seen


def noisy(embed: nn.Module) -> None:
    embed.neftune_noise_alpha = 5.0

    def hook(module, args, output):
        if module.training:
            scale = module.neftune_noise_alpha / (output.shape[1] * output.shape[2]) ** 0.5
            output = output + torch.zeros_like(output).uniform_(-scale, scale)
        return output

    embed.register_forward_hook(hook)


class Dropping(nn.Embedding):
    """Embeddings with dropout of their own, as some models have."""

    def __init__(self, other: nn.Embedding) -> None:
        super().__init__(*other.weight.shape)
        self.weight = other.weight
        self.dropout = nn.Dropout(0.5)

    def forward(self, ids):
        return self.dropout(super().forward(ids))


def prepared(kind: str):
    """A model in which training changes the embeddings, and its adapter."""
    model = tiny.llava()
    if kind == "dropout":
        model.set_input_embeddings(Dropping(model.get_input_embeddings()))
    adapter = patch_model(model)
    if kind == "lora":
        wrapped = get_peft_model(model, LoraConfig(target_modules=["embed_tokens", "q_proj"], lora_dropout=0.5))
        tiny.train_randomly(wrapped)
    if kind == "trainable tokens":
        wrapped = get_peft_model(
            model, LoraConfig(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [20, 30]})
        )
        tiny.train_randomly(wrapped)
    if kind != "dropout":
        noisy(model.get_input_embeddings())
    return model, adapter


@pytest.mark.parametrize("kind", ["noise", "dropout", "lora", "trainable tokens"])
@pytest.mark.parametrize("explicit", [False, True])
def test_the_instruction_is_embedded_as_in_eval_mode(kind, explicit):
    """With the weights of the moment: what PEFT trains of the embeddings counts."""
    model, adapter = prepared(kind)
    seen = instructions(adapter)
    inputs = tiny.token_inputs([1])
    labels = torch.where(inputs["input_ids"] == 40, 40, -100)
    told = {"instruction": torch.tensor([[1, 20, 30]])} if explicit else {}
    embed = model.get_input_embeddings()
    model.eval()(**inputs, labels=labels, **told)
    model.train()(**inputs, labels=labels, **told).loss.backward()
    assert torch.equal(seen[0], seen[1])
    assert not seen[1].requires_grad
    assert all(part.training for part in embed.modules())
    prompt = embed(inputs["input_ids"])
    assert not torch.equal(prompt, embed(inputs["input_ids"]))  # the prompt's own still get it
    if explicit and kind in ("lora", "trainable tokens"):
        original = embed.base_layer.weight if kind == "lora" else embed.token_adapter.base_layer.weight
        same = (seen[1][0] == original[[1, 20, 30]]).all(dim=1)
        assert same.tolist() == ([False] * 3 if kind == "lora" else [True, False, False])


def test_hooks_that_bring_weights_still_run():
    """As those of FSDP and DeepSpeed do."""
    model = tiny.llava()
    adapter = patch_model(model)
    weight = model.get_input_embeddings().weight
    kept = weight.data.clone()
    embed = model.get_input_embeddings()
    embed.register_forward_pre_hook(lambda module, args: bool(module.weight.data.copy_(kept)[:0].any()) or None)
    embed.register_forward_hook(lambda module, args, output: bool(module.weight.data.zero_().any()) or None)
    seen = instructions(adapter)
    weight.data.zero_()
    inputs = tiny.token_inputs([1])
    for train in (False, True):
        model.train(train)(**inputs, instruction=torch.tensor([[20, 30]]))
        assert torch.equal(seen[-1][0], kept[[20, 30]])


@pytest.mark.nightly
def test_compiled_training_has_no_noise_either():
    model, adapter = prepared("noise")
    seen = instructions(adapter)
    inputs = tiny.token_inputs([1])
    labels = torch.where(inputs["input_ids"] == 40, 40, -100)
    compiled = torch.compile(model.train(), backend="eager")
    compiled(**inputs, labels=labels)
    compiled(**inputs, labels=labels)
    model.eval()(**inputs, labels=labels)
    assert all(torch.equal(one, seen[-1]) for one in seen)
