"""PEFT around a patched model.

PEFT freezes what it doesn't know, wraps or copies projectors, and throws wrappers away when it merges. Its tuners
get guards that put the adapters back where they belong, as trainable as they were; a ``PeftModel`` gets guards that
save and load the adapters along with its own. A ``PeftModel`` without a tuner learns virtual tokens (prompt tuning,
prefix tuning, p-tuning): it freezes the model itself, and calls it with another prompt than it was given. PEFT itself
is never imported: a tuner is recognised by its public methods.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from ..alignment.module import EmmaAlignment
from ..checkpoints import beside_lora, hub, pushing, reading, writing
from ..checkpoints.format import SUBFOLDER
from ..errors import CheckpointError, PatchError
from ..files.hub import is_local
from ..modules.method_guard import STATE_ATTRIBUTE, MethodGuard, arguments_by_name
from ..modules.wrappers import is_peft_model
from ..patching import projectors, sites, trainable_parameters
from ..patching.hooks import install_projector_hooks, install_prompt_hooks, remove_hooks
from ..patching.own_projector import OwnProjector
from ..patching.state import AdapterState, state_of
from . import restoring
from .reference_model_checks import REFERENCE_LORA, check_reference_pass


def guard_wrappers(around: Sequence[nn.Module]) -> None:
    """Guard the ``PeftModel`` and the tuner that are already around a model to be patched."""
    for model in filter(is_peft_model, around):
        tuner: Any = model.base_model
        _guard_peft_model(model, tuner)
        if _is_tuner(tuner):
            _guard_tuner(tuner)


def release_wrappers(around: Sequence[nn.Module]) -> None:
    """Take the guards off a ``PeftModel`` whose model was unpatched, and off its tuner."""
    for model in filter(is_peft_model, around):
        wrappers: tuple[Any, ...] = (model, model.base_model)
        for wrapper in wrappers:
            remove_hooks(wrapper)
            for guard in [value for value in vars(wrapper).values() if isinstance(value, MethodGuard)]:
                guard.remove(wrapper)


def _on_registration(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
    if name == "model" and _is_tuner(module) and _is_patched(submodule):
        _guard_tuner(module)
    elif name in ("base_model", "prompt_encoder") and hasattr(type(module), "get_base_model"):
        # PEFT makes a tuner before its PeftModel, and virtual tokens after it.
        if name == "base_model" and _is_patched(submodule):
            _guard_peft_model(module, submodule)
        elif not _is_patched(module):
            configs = getattr(submodule if name == "base_model" else module, "peft_config", None)
            beside_lora.warn_if_told(configs.values() if isinstance(configs, dict) else ())


# PyTorch reports each submodule that any module is given. A tuner is given its model before it changes the model.
register_module_module_registration_hook(_on_registration)


def _is_tuner(module: nn.Module) -> bool:
    return all(hasattr(type(module), name) for name in ("inject_adapter", "merge_and_unload"))


def _is_patched(module: nn.Module | None) -> bool:
    return isinstance(getattr(module, STATE_ATTRIBUTE, None), AdapterState)


def _guard_tuner(tuner: nn.Module) -> None:
    # These methods replace modules of the model, or freeze its parameters.
    MethodGuard.install_once(tuner, "inject_adapter", _keep_adapters_and_own_projectors)
    for name in ("merge_and_unload", "unload", "delete_adapter"):
        MethodGuard.install_once(tuner, name, _keep_adapters)


def _guard_peft_model(model: nn.Module, base: Any) -> None:
    MethodGuard.install_once(model, "save_pretrained", _save_with_adapters)
    MethodGuard.install_once(model, "load_adapter", _load_with_adapter)
    MethodGuard.install_once(model, "disable_adapter", _through_reference)
    MethodGuard.install_once(model, "set_adapter", _note_reference)
    MethodGuard.install_once(model, "create_or_update_model_card", _tell_in_card)
    pushing.install(model)
    if not _is_tuner(base):
        MethodGuard.install_once(model, "add_adapter", _keep_adapters)
        install_prompt_hooks(model)


def _keep_adapters(tuner: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    model: nn.Module = state_of(tuner).model
    state = state_of(model)
    attached = [(adapter, adapter.alignments(), adapter.own_projectors()) for adapter in state.adapters.values()]
    trainable = [(parameter, parameter.requires_grad) for parameter in state.parameters()]
    with trainable_parameters.as_before_train_only(model):
        result = original(*args, **kwargs)
        for adapter, alignments, own_projectors in attached:
            for place, site in adapter.sites().items():
                if sites.PLACE_ATTRIBUTE not in site.__dict__:
                    _move_here(site, place, state)
                _put(site, adapter.name, alignments[place])
                if place in own_projectors:
                    _put(site, adapter.name, own_projectors[place])
    for parameter, was_trainable in trainable:
        parameter.requires_grad_(was_trainable)
    return result


def _keep_adapters_and_own_projectors(tuner: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    model = state_of(tuner).model
    state = state_of(model)
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    trainable_before = state.trainable_before
    result = _keep_adapters(tuner, original, *args, **kwargs)
    if any(adapter.own_projectors() and projectors.is_wrapped(adapter) for adapter in state.adapters.values()):
        if len(tuner.peft_config) == 1:
            tuner.unload()
            state.trainable_before = trainable_before
            # By name, since a projector that PEFT has copied is another module by now.
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(trainable[name])
        raise PatchError(
            "PEFT would wrap the projector, trained with the EMMA adapter, which could no longer be saved with it: "
            "leave one of the two out, by train_only() without projector=True, or by LoraConfig(exclude_modules=…)"
        )
    return result


def _move_here(projector: nn.Module, place: str, state: AdapterState) -> None:
    """Make ``projector``, a wrapper or the module that was inside of one, the module that adapters sit at."""
    for module in list(projector.modules()):
        if sites.PLACE_ATTRIBUTE in module.__dict__:
            remove_hooks(module)
            sites.detach(module)
    sites.mark(projector, place, state)
    install_projector_hooks(projector)


def _put(projector: nn.Module, adapter: str, module: EmmaAlignment | OwnProjector) -> None:
    if not any(part is module for part in projector.modules()):
        sites.attach(projector, adapter, module)


def _save_with_adapters(model: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Save every adapter too, in a folder of its name in ``emma_adapter/``.

    One level higher, Trainer would take it for an adapter of PEFT when it resumes.
    """
    arguments = arguments_by_name(original, args, kwargs)
    base = state_of(model).model
    directory, gathered = Path(arguments["save_directory"]), arguments.get("state_dict")
    is_main_process = arguments.get("is_main_process", True)
    if gathered is not None:
        kwargs["state_dict"] = dict(gathered)
        _leave_out_adapters(model, kwargs["state_dict"])
        base_name = next(name for name, module in model.named_modules() if module is base)
        gathered = {name.removeprefix(f"{base_name}."): value for name, value in gathered.items()}
    with _adapters_left_out(model):
        result = original(*args, **kwargs)
    if is_main_process or gathered is None:
        folder = directory / SUBFOLDER
        for adapter in state_of(base).adapters:
            writing.save(base, folder / adapter, adapter, is_main_process=is_main_process, gathered=gathered)
        # An adapter that a save of the base model has left here would be found before these.
        writing.discard(folder)
    if is_main_process:
        for name in arguments.get("selected_adapters") or model.peft_config:
            beside_lora.tell_in_config(directory if name == "default" else directory / name)
    return result


@contextmanager
def _adapters_left_out(model: nn.Module) -> Iterator[None]:
    """Leave the adapters out of state dicts: with ``bias="all"`` PEFT saves whatever is called a bias."""

    def leave_out(_: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
        _leave_out_adapters(model, state_dict, prefix)

    hook = model.register_state_dict_post_hook(leave_out)
    try:
        yield
    finally:
        hook.remove()


def _leave_out_adapters(model: nn.Module, state_dict: dict[str, Any], prefix: str = "") -> None:
    alignments = [name for name, module in model.named_modules() if isinstance(module, EmmaAlignment)]
    prefixes = tuple(f"{prefix}{name}." for name in alignments)
    for name in [name for name in state_dict if name.startswith(prefixes)]:
        del state_dict[name]


def _tell_in_card(model: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    result = original(*args, **kwargs)
    beside_lora.tell_in_card(model, Path(arguments_by_name(original, args, kwargs)["output_dir"]))
    return result


@contextlib.contextmanager
def _through_reference(model: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Iterator[None]:
    """Have calls go through the frozen adapter, if one is kept: the model with its LoRA off is the reference."""
    state = state_of(model)
    check_reference_pass(model)
    reference = contextlib.nullcontext() if state.reference is None else state.using(state.reference)
    with original(*args, **kwargs), reference:
        yield


def _note_reference(model: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Note whether TRL's frozen copy of a LoRA that was trained before, made for reference passes, becomes active."""
    state = state_of(model)
    name = arguments_by_name(original, args, kwargs).get("adapter_name")
    if name == REFERENCE_LORA:
        check_reference_pass(model)
    result = original(*args, **kwargs)
    state.in_reference = name == REFERENCE_LORA
    return result


def _load_with_adapter(model: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Load the adapter that was saved beside a LoRA too, if the model uses that LoRA."""
    arguments = arguments_by_name(original, args, kwargs)
    result = original(*args, **kwargs)
    state = state_of(model)
    if arguments["adapter_name"] in model.active_adapters:
        for parent in _folders(arguments):
            folder = reading.find(parent, state.active)
            if reading.is_adapter(folder):
                restoring.restore(state.model, restoring.read_for(state.model, folder))
                break
    return result


def _folders(arguments: Mapping[str, Any]) -> Iterator[Path]:
    """Yield the folders in which an adapter may lie beside the one of PEFT that ``load_adapter`` was asked for.

    They are the folder of PEFT's adapter and, if that folder has the adapter's name, the one above: PEFT gives adapters
    other than ``"default"`` folders of their names.
    """
    source, subfolder = arguments["model_id"], PurePosixPath(arguments.get("subfolder") or "")
    name = str(arguments["adapter_name"])
    if is_local(source):
        folder = Path(source) / subfolder
        yield folder
        if folder.name == name:
            yield folder.parent
        return
    options = {key: arguments[key] for key in ("revision", "token", "local_files_only") if key in arguments}
    for place in (subfolder, subfolder.parent) if subfolder.name == name else (subfolder,):
        try:
            yield hub.local_folder(source, subfolder=str(place), **options)
        except CheckpointError as error:
            warnings.warn(
                f"PEFT's adapter was loaded, and whether an EMMA adapter lies beside it couldn't be found out: {error}",
                stacklevel=2,
            )
            return
