"""Checks of the reference of a trainer that learns from preferences or rewards.

TRL makes the reference of the parts that it knows, and it doesn't know adapters.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from ..errors import PatchError
from ..modules import private
from ..modules.method_guard import STATE_ATTRIBUTE
from ..modules.sharding import is_elsewhere
from ..modules.wrappers import base_of
from ..patching.setup_checks import is_identity
from ..patching.state import state_of

#: TRL's name for its frozen copy of a LoRA that was trained before.
REFERENCE_LORA = "ref"
_REMEDY = "from emma_adapter.integrations.trl import keep_reference; keep_reference(trainer) before trainer.train()"


def warn_of_bare_reference(model: nn.Module, trainer: Any) -> None:
    """Warn if a trainer that starts compares the model, whose adapter was trained before, with the bare base model."""
    reference = getattr(trainer, "ref_model", None)
    # The reference is the model at the beginning, and a resumed run isn't there any more.
    if not isinstance(reference, nn.Module) or trainer.state.global_step > 0:
        return
    parameters = list(state_of(model).current.named_parameters().values())
    if hasattr(base_of(reference), STATE_ATTRIBUTE) or any(map(is_elsewhere, parameters)) or is_identity(parameters):
        return
    warnings.warn(
        f"the reference of this {type(trainer).__name__} is the base model without the EMMA adapter, which the model "
        f"has at the start: {_REMEDY}, or ref_model=reference_model(model) of the same module. If the bare base is "
        "what you mean, ignore this",
        stacklevel=2,
    )


def check_reference_pass(model: nn.Module) -> None:
    """Check that a trainer whose reference is the model without its LoRA doesn't train that reference.

    Raises:
        PatchError: if the adapter is trained, and no frozen copy is kept for such passes.
    """
    state = state_of(model)
    if state.reference is not None or not model.training:
        return
    trained = any(parameter.requires_grad for parameter in state.current.named_parameters().values())
    if trained and (trainer := private.running_trainer()) is not None and hasattr(trainer, "ref_model"):
        raise PatchError(
            f"the reference of this {type(trainer).__name__} is the model without its LoRA, but with the EMMA adapter, "
            f"which is being trained, so that the reference would change with it: {_REMEDY}"
        )
