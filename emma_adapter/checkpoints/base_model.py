"""Saves of a patched model, by ``model.save_pretrained`` and by Trainer.

- ``model.save_pretrained(folder)`` writes the base model without the adapter, so that it reloads as the model it
  was, and the adapter beside it in ``emma_adapter/``; further adapters in ``emma_adapter/<name>/``.
- Trainer resumes from the ``model.safetensors`` that it finds in a checkpoint. What a save by a Trainer writes depends
  on what is trained at that moment:

  - the adapter alone, or with the projector that belongs to it: the adapter folder, and a ``model.safetensors`` with
    only the trained tensors, under the model's names;
  - anything else as well: the whole model, adapter included, and the adapters once more in ``emma_adapter/``;
  - a LoRA from ``model.add_adapter`` as well: the LoRA as transformers writes it, the adapters in ``emma_adapter/``,
    and a ``model.safetensors`` with every trained tensor.
"""

from __future__ import annotations

import errno
import functools
import logging
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..modules import private, sharding
from ..modules.method_guard import arguments_by_name
from ..patching.state import AdapterState, state_of
from . import hub, reading, writing
from .format import SUBFOLDER

_TRAINER_WEIGHTS = "model.safetensors"
#: Prefixes of what ``unify_model`` and ``add_vision_expert`` add, which has files of its own.
_OTHER_PARTS = ("emma_unified.", "emma_experts.")
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_log = logging.getLogger(__name__)


def guard_save_pretrained(model: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    kwargs = arguments_by_name(original, args, kwargs)
    if "save_directory" not in kwargs:
        # The original raises the error about the missing argument.
        return original(**kwargs)
    directory = Path(kwargs["save_directory"])
    if private.running_trainer() is not None:
        return _save_checkpoint(model, original, directory, kwargs)
    gathered = kwargs.get("state_dict")
    base_tensors = _base_state_dict(model)
    if gathered is not None:
        base_tensors = {name: value for name, value in gathered.items() if name in base_tensors}
    save_options = {"is_main_process": kwargs.get("is_main_process", True), "gathered": gathered}
    # The original uploads the folder before it returns; and if tensors were not gathered, saving the adapters fails
    # before anything is written.
    adapters_first = bool(kwargs.get("push_to_hub")) or gathered is not None
    if adapters_first:
        _save_adapters_beside(model, directory, **save_options)
    with private.whole_saves(model), _state_dict_is(model, base_tensors):
        result = original(**{**kwargs, "state_dict": base_tensors})
    if not adapters_first:
        _save_adapters_beside(model, directory, **save_options)
    _log.info("saved the base model to %s, and the adapter beside it", directory)
    return result


def _save_checkpoint(model: nn.Module, original: Callable[..., Any], directory: Path, kwargs: dict[str, Any]) -> Any:
    """Write the checkpoint that Trainer resumes from."""
    gathered = kwargs.get("state_dict")
    is_main_process = kwargs.get("is_main_process", True)
    trained = _trained_ids(model)
    if not trained - _adapter_parameter_ids(model):
        if is_main_process:
            _save_adapter_only(model, directory, trained, gathered)
        return None
    # Trainer loads tensors under the names of the running model, and drops those that have other names.
    kwargs.setdefault("save_original_format", False)
    with private.whole_saves(model):
        result = original(**kwargs)
    if is_main_process:
        if private.has_peft_adapters(model):
            writing.save_tensors(directory, _TRAINER_WEIGHTS, _trained_tensors(model, trained, gathered))
        _save_adapters_beside(model, directory, is_main_process=True, gathered=gathered)
        _log.info("saved the whole model to %s, since more of it is trained than the adapter", directory)
    return result


def _save_adapter_only(
    model: nn.Module, directory: Path, trained: set[int], gathered: Mapping[str, Tensor] | None
) -> None:
    if _CHECKPOINT.fullmatch(directory.name):
        _check_holds_no_model(directory)
    trainer_weights = {}
    if not reading.holds_model(directory):
        trainer_weights = {_TRAINER_WEIGHTS: _trained_tensors(model, trained, gathered)}
    writing.save(model, directory, is_main_process=True, gathered=gathered, further=trainer_weights)
    _log.info("saved the adapter alone to %s, since nothing else is trained", directory)


def _save_adapters_beside(model: nn.Module, directory: Path, *, is_main_process: bool, **more: Any) -> None:
    writing.save_all(model, directory / SUBFOLDER, is_main_process=is_main_process, **more)
    if is_main_process:
        # An earlier save may have put the adapter here: transformers would take it for one of PEFT, and load_adapter
        # for the newer one.
        writing.discard(directory)


def expect_checkpoints(model: nn.Module) -> None:
    """Have Trainer accept, when it resumes, that a checkpoint of the adapter alone lacks what isn't trained."""
    private.leave_out_of_saves(model, functools.partial(_left_out, state_of(model)))


def check_output_folder(model: nn.Module, trainer: Any) -> None:
    """Check that a Trainer, which is about to start, will be able to write its checkpoints.

    Raises:
        FileExistsError: if one of them would replace another tool's adapter, or the weights of a model.
    """
    # PEFT saves a PeftModel, transformers saves a model that is trained whole, and one that a Trainer only uses isn't
    # saved at all.
    by_peft = hasattr(type(trainer.model), "get_base_model")
    if by_peft or model not in trainer.model.modules() or _trained_ids(model) - _adapter_parameter_ids(model):
        return
    folder = Path(trainer.args.output_dir)
    # The folder that trainer.save_model() writes.
    writing.check_not_foreign(folder)
    # Only the process that pushes has hub_model_id.
    if trainer.args.push_to_hub and trainer.hub_model_id is not None:
        _check_repository(trainer)
    if trainer.args.save_strategy == "no":
        return
    for earlier in folder.glob("checkpoint-*"):
        number = _CHECKPOINT.fullmatch(earlier.name)
        if number and trainer.state.global_step < int(number[1]) <= trainer.state.max_steps:
            writing.check_not_foreign(earlier)
            _check_holds_no_model(earlier)


def _check_repository(trainer: Any) -> None:
    from huggingface_hub import HfApi

    args, repo_id = trainer.args, trainer.hub_model_id
    if hub.holds_a_model(HfApi(token=args.hub_token), repo_id, getattr(args, "hub_revision", None)):
        raise _would_replace_a_model(repo_id, "hub_model_id")


def _check_holds_no_model(checkpoint_folder: Path) -> None:
    if reading.holds_model(checkpoint_folder):
        raise _would_replace_a_model(str(checkpoint_folder), "output_dir")


def _would_replace_a_model(place: str, argument: str) -> FileExistsError:
    message = "this holds a whole model, whose weights would be replaced by those of the adapter alone"
    return FileExistsError(errno.EEXIST, f"{message}; train with another {argument}", place)


def _base_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of the base model alone."""
    adapter_tensor_ids = {
        id(tensor)
        for adapter in state_of(model).adapters.values()
        for module in (*adapter.alignments().values(), *adapter.own_projectors().values())
        for tensor in module.state_dict(keep_vars=True).values()
    }
    return {
        name: value.detach()
        for name, value in model.state_dict(keep_vars=True).items()
        if id(value) not in adapter_tensor_ids and not name.startswith(_OTHER_PARTS)
    }


@contextmanager
def _state_dict_is(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Have ``model.state_dict()`` return ``tensors`` in the block and in this thread, if the model is quantized.

    Of such a model transformers doesn't read what is passed as ``state_dict=``.
    """
    if getattr(model, "hf_quantizer", None) is None:
        yield
        return
    thread = threading.get_ident()

    def replace(_: nn.Module, state_dict: dict[str, Tensor], prefix: str, __: Any) -> None:
        if threading.get_ident() == thread:
            for name in [name for name in state_dict if name.startswith(prefix)]:
                del state_dict[name]
            state_dict.update({prefix + name: value for name, value in tensors.items()})

    handle = model.register_state_dict_post_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def _trained_ids(model: nn.Module) -> set[int]:
    """Return the ids of parameters that are trainable, or that a running Trainer has trained and frozen since."""
    optimizer = getattr(private.running_trainer(), "optimizer", None)
    stepped = {id(parameter) for parameter, values in getattr(optimizer, "state", {}).items() if values}
    return {id(p) for p in model.parameters() if p.requires_grad or id(p) in stepped}


def _adapter_parameter_ids(model: nn.Module) -> set[int]:
    """Return the ids of the parameters that adapter folders hold."""
    return {id(parameter) for parameter in state_of(model).parameters()}


def _trained_tensors(
    model: nn.Module, trained: set[int], gathered: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    return sharding.gather(model, _trained_names(model, trained), gathered)


def _trained_names(model: nn.Module, trained: set[int]) -> dict[str, Tensor]:
    """Return what is trained, and what else belongs to the active adapter, by name in the model."""
    active = state_of(model).current
    adapter_tensors = (*active.state_dict(keep_vars=True).values(), *active.projector_parameters().values())
    tensor_ids = {id(tensor) for tensor in adapter_tensors} | trained
    return {name: value for name, value in model.state_dict(keep_vars=True).items() if id(value) in tensor_ids}


def _left_out(state: AdapterState) -> set[str] | None:
    model = state.model
    trained = _trained_ids(model)
    if trained - _adapter_parameter_ids(model) and not private.has_peft_adapters(model):
        return None
    return set(model.state_dict()) - set(_trained_names(model, trained))
