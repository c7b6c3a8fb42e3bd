"""Optimizers that other tools make for LoRA, of a model that has the adapter too."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer

from emma_adapter import ConfigError, get_adapter
from tests.adapter.test_trainer import QUESTIONS, patched, trainer_for

# The last layer of the vision tower isn't read, and LoRA-FA wants every gradient.
LORA = LoraConfig(r=2, target_modules=r".*language_model.*q_proj")


def wrapped(*, projector=False):
    model = patched()
    get_adapter(model).train_only(projector=projector)
    return get_peft_model(model, LORA)


def loraplus(model):
    return create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16)


def lorafa(model):
    return create_lorafa_optimizer(model, r=2, lora_alpha=8, lr=1e-4)


def rates(optimizer, parameters):
    wanted = {id(parameter) for parameter in parameters}
    return {group["lr"] for group in optimizer.param_groups for p in group["params"] if id(p) in wanted}


def test_lora_plus_sorts_the_adapter_by_a_rule_that_is_not_made_for_it():
    """If this fails, PEFT has changed its rule."""
    model = wrapped()
    assert rates(loraplus(model), get_adapter(model).parameters()) == {1e-4, 16e-4}


@pytest.mark.parametrize("make", [loraplus, lorafa], ids=["LoRA+", "LoRA-FA"])
def test_regroup_gives_the_adapter_a_rate_of_its_own(make):
    model = wrapped()
    adapter, optimizer = get_adapter(model), make(model)
    own = {id(parameter) for parameter in adapter.parameters()}
    lora = {n: p for n, p in model.named_parameters() if p.requires_grad and id(p) not in own}
    before = rates(optimizer, lora.values())
    assert adapter.regroup(optimizer, lr=1e-3, weight_decay=0.1).alignment is adapter.alignment
    assert rates(optimizer, adapter.parameters()) == {1e-3}
    assert rates(optimizer, lora.values()) == before
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert len(held) == len(set(held))
    values = {name: parameter.detach().clone() for name, parameter in adapter.named_parameters()}
    model.train()(**QUESTIONS.batch).loss.backward()
    optimizer.step()
    assert any(not torch.equal(parameter, values[name]) for name, parameter in adapter.named_parameters())
    with pytest.raises(ConfigError, match="no step"):
        adapter.regroup(optimizer, lr=1e-3)


def test_regroup_of_a_trained_projector():
    model = patched()
    adapter = get_adapter(model).train_only(projector=True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0, momentum=0.9)
    adapter.regroup(optimizer, lr=1e-3, projector_lr=1e-5)
    assert rates(optimizer, adapter.parameters()) == {1e-3}
    assert rates(optimizer, adapter.projector.linear_1.parameters()) == {1e-5}
    assert all(group["momentum"] == 0.9 for group in optimizer.param_groups)


def said_by_a_run(model, folder, optimizer=None):
    trainer = trainer_for(model, folder, max_steps=2, save_strategy="no")
    trainer.optimizer = optimizer
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    return [str(warning.message) for warning in caught if "regroup" in str(warning.message)]


def test_trainer_with_lora_plus_warns_until_it_is_regrouped(tmp_path):
    model = wrapped()
    [said] = said_by_a_run(model, tmp_path, loraplus(model))
    assert "0.0001, 0.0016" in said
    optimizer = loraplus(model)
    get_adapter(model).regroup(optimizer, lr=1e-3)
    assert not said_by_a_run(model, tmp_path, optimizer)


def test_rates_that_the_user_has_chosen_are_not_warned_of(tmp_path):
    model = patched()
    adapter = get_adapter(model).train_only(projector=True)
    own = dict(adapter.named_parameters())
    groups = [{"params": [p for n, p in own.items() if "norm" in n], "lr": 1e-2}]
    groups += [{"params": [p for n, p in own.items() if "norm" not in n], "lr": 1e-3}]
    assert not said_by_a_run(model, tmp_path, torch.optim.AdamW(groups))
    assert not said_by_a_run(model, tmp_path, torch.optim.AdamW(adapter.parameter_groups(1e-3, projector_lr=1e-5)))
    assert not said_by_a_run(wrapped(), tmp_path)
