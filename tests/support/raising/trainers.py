"""Errors about the reference that a trainer compares the model with."""

from __future__ import annotations

from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from emma_adapter import PatchError
from emma_adapter.integrations.trl import keep_reference, reference_model
from tests.support import tiny

from .models import sharded
from .triggers import Bench, question, raises


class Preferring(Trainer):
    """What TRL's trainers do with a reference."""

    def __init__(self, bench: Bench, model, ref_model=None) -> None:
        arguments = TrainingArguments(str(bench.folder), use_cpu=True, report_to=[], max_steps=1)
        super().__init__(model, arguments, train_dataset=[{"labels": [0]}])
        self.ref_model = ref_model

    def compute_loss(self, model, inputs, *args, **kwargs):
        with model.disable_adapter():
            return model(**question()).logits.mean()


@raises(PatchError, "adapter/reference_model_checks.py:check_reference_pass", "would change with it")
def comparing_with_an_adapter_that_is_trained(bench: Bench) -> None:
    model = get_peft_model(bench.adapter().model, LoraConfig(r=2, target_modules=["q_proj"]))
    Preferring(bench, model).train()


@raises(PatchError, "integrations/trl.py:keep_reference", "training has begun")
def keeping_a_reference_too_late(bench: Bench) -> None:
    trainer = Preferring(bench, bench.adapter().model)
    trainer.state.global_step = 1
    keep_reference(trainer)


@raises(PatchError, "adapter/reference_model.py:make_alike", "of other parameters")
def a_reference_of_another_size(bench: Bench) -> None:
    keep_reference(Preferring(bench, bench.adapter().model, tiny.llava(vocab_size=400)))


@raises(PatchError, "adapter/reference_model.py:_check_whole", "can't be copied")
def a_reference_of_a_sharded_model(bench: Bench) -> None:
    with sharded(bench.adapter().model) as model:
        reference_model(model)


@raises(PatchError, "adapter/reference_model.py:_check_frozen", "is trained by now")
def training_what_a_reference_shares(bench: Bench) -> None:
    model = bench.adapter().train_only().model
    reference = reference_model(model)
    model.requires_grad_(True)
    reference(**question())
