"""References for TRL's trainers: the model that training starts from, its adapter included.

By default, DPO, KTO, GRPO and RLOO compare with the base model, loaded again by its name, or, if a LoRA is trained,
with the model without its LoRA, whose EMMA adapter continues to be trained.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from emma_adapter import PatchError
from emma_adapter.adapter.reference_model import frozen_copy, keep, make_alike
from emma_adapter.modules.method_guard import STATE_ATTRIBUTE
from emma_adapter.modules.wrappers import around, base_of, is_peft_model
from emma_adapter.patching.state import state_of

__all__ = ["keep_reference", "reference_model"]


def reference_model(model: nn.Module) -> nn.Module:
    """Return the model as it is now, frozen, for a trainer's ``ref_model=``.

    Parameters that the model doesn't train are shared with it, and need no memory: first make trainable what will be
    trained.

    Args:
        model: a patched model, also a ``PeftModel`` around one.

    Raises:
        PatchError: if the model is not patched, or sharded.
    """
    return frozen_copy(model)


def keep_reference(trainer: Any) -> None:
    """Make the model as it is now a trainer's reference. Call it once the trainer is made, before ``train()``.

    A reference that the trainer has loaded becomes a frozen copy of the model, and shares what isn't trained. If a LoRA
    is trained, and the reference is the model without it, a frozen copy of the adapter is added to the model under the
    name ``"reference"``, and used while the LoRA is off; ``adapter.delete_adapter("reference")`` removes it. A trainer
    without a reference, such as GRPO's with ``beta=0``, or with a patched one, stays as it is.

    Args:
        trainer: TRL's DPOTrainer, KTOTrainer, GRPOTrainer, RLOOTrainer, or one like them.

    Raises:
        PatchError: if the model is not patched, training has begun, or a model is sharded.
    """
    model = base_of(trainer.model)
    state_of(model)
    if trainer.state.global_step > 0:
        raise PatchError("the training has begun, and what it started from is gone: keep_reference before train()")
    # The teacher of self-distillation is a reference by another name; any other teacher is a separate model.
    self_distills = hasattr(trainer.args, "teacher_model_kind")
    reference = getattr(trainer, "teacher_model" if self_distills else "ref_model", None)
    if reference is not None and base_of(reference) is not model:
        if not hasattr(base_of(reference), STATE_ATTRIBUTE):
            make_alike(base_of(reference), model)
    elif any(map(is_peft_model, around(trainer.model))):
        keep(model)
