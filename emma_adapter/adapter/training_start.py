"""Checks and preparations at the start of a training run, before hours are spent on it."""

from __future__ import annotations

import contextlib
import functools
import warnings
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from ..checkpoints import base_model
from ..errors import PatchError
from ..modules import private
from ..modules.method_guard import STATE_ATTRIBUTE, arguments_by_name
from ..patching import precision
from ..patching.state import AdapterState, state_of
from . import reference_model_checks

#: The Trainers that have begun.
_started: weakref.WeakSet[Any] = weakref.WeakSet()


def guard_train(part: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Prepare a training run: ``model.train()``, which reaches every part, comes before its first step."""
    result = original(*args, **kwargs)
    if arguments_by_name(original, args, kwargs).get("mode", True):
        # The part may be all that is left of a model.
        with contextlib.suppress(PatchError):
            _begin(state_of(part).model)
    return result


def _begin(model: nn.Module) -> None:
    precision.restore_weights(model)
    trainer = private.running_trainer()
    # A Trainer that is only being made doesn't know its arguments yet.
    if trainer is not None and trainer.is_in_train and trainer not in _started:
        base_model.check_output_folder(model, trainer)
        if trainer.args.push_to_hub:
            # It imports transformers.
            from ..checkpoints.push_callback import AdapterPushCallback

            trainer.add_callback(AdapterPushCallback)
        reference_model_checks.warn_of_bare_reference(model, trainer)
        _warn_of_mixed_rates(model, trainer)
        _started.add(trainer)


def expect_trainer(model: nn.Module) -> None:
    """Have a Trainer that is made with a quantized model ask whether there is an adapter to train."""
    private.answer_trainer(model, STATE_ATTRIBUTE, functools.partial(_meet_trainer, state_of(model)))


def _meet_trainer(state: AdapterState) -> bool:
    """Return, for a Trainer that is being made with a quantized model, whether there is an adapter to train.

    TRL has cast the adapter by then, and DistributedDataParallel hasn't read its dtypes yet.
    """
    model = state.model
    precision.restore_weights(model)
    trainable = any(parameter.requires_grad for parameter in state.current.named_parameters().values())
    return trainable and private.may_be_trained_through(model)


def _warn_of_mixed_rates(model: nn.Module, trainer: Any) -> None:
    """Warn if another tool's rule gives parts of the adapter different rates, in groups with other parameters."""
    adapter = {id(parameter) for parameter in state_of(model).current.named_parameters().values()}
    rates = set()
    for group in getattr(trainer.optimizer, "param_groups", ()):
        in_adapter = [id(parameter) in adapter for parameter in group["params"]]
        if any(in_adapter):
            # A scheduler may have changed the rate already.
            rates.add((float(group.get("initial_lr", group["lr"])), all(in_adapter)))
    if len({rate for rate, _ in rates}) > 1 and not all(alone for _, alone in rates):
        listed_rates = ", ".join(f"{rate:g}" for rate in sorted({rate for rate, _ in rates}))
        warnings.warn(
            f"the optimizer trains parts of the EMMA adapter at different learning rates ({listed_rates}), by a rule "
            "that isn't made for it: LoRA+ gives its norms and biases the rate of lora_B. Call "
            "adapter.regroup(optimizer, lr=...) after the optimizer is made",
            stacklevel=3,
        )
