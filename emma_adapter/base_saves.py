"""What ``model.save_pretrained`` and Trainer checkpoints of a patched model hold.

- ``model.save_pretrained(folder)`` writes the base model without the adapter, so that it reloads as the model it
  was, and the adapter beside it in ``emma_adapter/``; further adapters in ``emma_adapter/<name>/``.
- Trainer calls ``model.save_pretrained(folder, state_dict=...)`` and resumes from the ``model.safetensors`` it finds.
  After ``adapter.train_only()`` that call writes the adapter folder, and a ``model.safetensors`` with the trained
  tensors alone, under the model's names. Before, it writes everything, adapter included, so that resuming is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from . import attachment, checkpoint, saving, sharding
from .guards import arguments_by_name
from .state import state_of
from .training import original_projectors, projector_parameters, trained_projectors

_IGNORED_ON_SAVE = "_keys_to_ignore_on_save"
_TRAINER_WEIGHTS = "model.safetensors"


def guard_save_pretrained(model: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    kwargs = arguments_by_name(original, args, kwargs)
    if "save_directory" not in kwargs:
        # It knows best what to say.
        return original(**kwargs)
    directory = Path(kwargs["save_directory"])
    by_trainer = "state_dict" in kwargs
    gathered = kwargs.get("state_dict")
    is_main_process = kwargs.get("is_main_process", True)
    if by_trainer and state_of(model).adapter_only:
        if is_main_process:
            _save_trained(model, directory, gathered)
        return None
    if by_trainer:
        # Trainer loads what it finds under the names of the running model, and drops what has another name.
        kwargs.setdefault("save_original_format", False)
    else:
        kwargs["state_dict"] = _base_state_dict(model)
    folder = directory / checkpoint.SUBFOLDER
    uploads = bool(kwargs.get("push_to_hub"))
    if uploads:
        # What lies in the folder, before it returns.
        saving.save_all(model, folder, is_main_process=is_main_process, gathered=gathered)
    adapter_only = state_of(model).adapter_only
    expect_everything(model)
    try:
        result = original(**kwargs)
    finally:
        if adapter_only:
            expect_adapter_only(model)
    if not uploads and (is_main_process or not by_trainer):
        saving.save_all(model, folder, is_main_process=is_main_process, gathered=gathered)
    return result


def expect_adapter_only(model: nn.Module) -> None:
    """Trainer's checkpoints hold the adapter only. Trainer is told which keys are missing on purpose: on resuming
    it compares the missing ones with this set, and warns if they differ."""
    state = state_of(model)
    if not state.adapter_only:
        state.adapter_only = True
        state.ignored_on_save = model.__dict__.get(_IGNORED_ON_SAVE)
    model.__dict__[_IGNORED_ON_SAVE] = set(model.state_dict()) - set(_trained_names(model))


def expect_everything(model: nn.Module) -> None:
    """Undo :func:`expect_adapter_only`."""
    state = state_of(model)
    if state.adapter_only:
        state.adapter_only = False
        model.__dict__.pop(_IGNORED_ON_SAVE, None)
        if state.ignored_on_save is not None:
            model.__dict__[_IGNORED_ON_SAVE] = state.ignored_on_save


def _base_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The model as it was before it was patched: without the adapter, and with the original projectors."""
    adapters = {
        key
        for adapter in state_of(model).adapters
        for key in _identities(attachment.state_dict(model, adapter, keep_vars=True))
    }
    trained = projector_parameters(model)
    originals = {id(trained[name]): value for name, value in original_projectors(model).items()}
    return {
        name: originals.get(id(value), value.detach())
        for name, value in model.state_dict(keep_vars=True).items()
        if id(value) not in adapters
    }


def _trained_names(model: nn.Module) -> dict[str, Tensor]:
    """The trained tensors by their name in the model."""
    trained = _identities(attachment.state_dict(model, keep_vars=True))
    if trained_projectors(model):
        trained |= _identities(projector_parameters(model))
    return {name: value for name, value in model.state_dict(keep_vars=True).items() if id(value) in trained}


def _identities(tensors: Mapping[str, Tensor]) -> set[int]:
    return {id(tensor) for tensor in tensors.values()}


def _save_trained(model: nn.Module, directory: Path, gathered: Mapping[str, Tensor] | None) -> None:
    tensors = sharding.gather(model, _trained_names(model), gathered)
    saving.save(model, directory, is_main_process=True, gathered=gathered, further={_TRAINER_WEIGHTS: tensors})
