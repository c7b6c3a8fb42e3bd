"""Everything that this library uses of others, and that is private there or changes between their releases.

Every function says whose name it is, what it is for, and which test fails first when the owner changes it.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable, Collection, Iterator, Set
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

#: What transformers has called the cache argument: ``past_key_values`` before 5.24, and until 5.40 as an alias.
_CACHE_NAMES = ("cache", "past_key_values")
#: The method of transformers' ``PushToHubMixin``, and so of PEFT's models, that uploads the folder that was saved. It
#: uploads the files of a folder and of its folders, and fails at folders in those. Held by
#: ``checkpoints/test_hub_pushes.py``.
UPLOAD = "_upload_modified_files"
_IGNORED_ON_SAVE = "_keys_to_ignore_on_save"
_REPLACED_FORWARD = ("forward", "_hf_hook", "_old_forward")
_HAS_PEFT_ADAPTERS = "_hf_peft_config_loaded"
_TRAINER_MODULES = ("transformers.trainer", "transformers.trainer_utils")


#: The submodule in which ``torch.compile``'s wrapper holds its model. Held by ``patching/test_wrapped.py``.
COMPILED = "_orig_mod"
#: The same for every wrapper: ``torch.compile``'s; those of DataParallel, DistributedDataParallel, AveragedModel and
#: DeepSpeed; FullyShardedDataParallel's. Held by ``patching/test_wrapped.py``.
HELD_AS = (COMPILED, "module", "_fsdp_wrapped_module")
#: The method of PyTorch's ``nn.Module`` by which ``nn.DataParallel`` makes replicas. Without it, replicas would run the
#: methods of the model they were made of. Held by
#: ``modules/test_private.py::test_replicas_are_made_by_a_method_of_the_module``.
REPLICATE = "_replicate_for_data_parallel"


def is_backward_running() -> bool:
    """Return whether this thread runs a backward: ``torch._C._current_graph_task_id``, as torch.utils.checkpoint asks.

    Held by ``modules/test_private.py::test_a_backward_is_noticed``.
    """
    return torch._C._current_graph_task_id() != -1


def is_transformed() -> bool:
    """Return whether ``vmap`` or another transform of functorch runs: ``torch._C._are_functorch_transforms_active``.

    Held by ``modules/test_private.py::test_a_transform_is_noticed``.
    """
    return bool(torch._C._are_functorch_transforms_active())


def storage_address(tensor: Tensor) -> int:
    """Return the key of a tensor's memory while that exists: ``UntypedStorage._cdata``, as torch.multiprocessing does.

    Held by ``modules/test_private.py::test_memory_has_an_address``.
    """
    return int(tensor.untyped_storage()._cdata)


def pre_hooks(module: nn.Module) -> list[Any]:
    """Return the forward pre-hooks of a module: ``_forward_pre_hooks``, since handles are lost when it is copied.

    Held by ``modules/test_private.py::test_hooks_are_found_and_removed``.
    """
    return list(module._forward_pre_hooks.values())


def is_last_hook(module: nn.Module, hook: Callable[..., Any]) -> bool:
    """Return whether ``hook`` is the forward hook of a module that runs after all others: ``_forward_hooks``.

    Held by ``modules/test_private.py::test_hooks_are_found_and_removed``.
    """
    hooks = module._forward_hooks
    return bool(hooks) and next(reversed(hooks.values())) is hook


def remove_hooks(module: nn.Module, functions: Collection[Callable[..., Any]]) -> None:
    """Remove these functions from the forward hooks and pre-hooks of a module.

    It may be a copy of the module that they were registered on, to which no handle belongs.

    Held by ``modules/test_private.py::test_hooks_are_found_and_removed``.
    """
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if any(hook is function for function in functions)]:
            del hooks[key]
            for flags in (
                module._forward_pre_hooks_with_kwargs,
                module._forward_hooks_with_kwargs,
                module._forward_hooks_always_called,
            ):
                flags.pop(key, None)


def parameters_of_running_ddp() -> set[int] | None:
    """Return the identities of the parameters whose gradients the running ``DistributedDataParallel`` averages.

    None if none runs, or the release of PyTorch doesn't tell: ``_get_active_ddp_module`` and ``_module_parameters``.
    Without them, a model that was patched after it was wrapped isn't refused. Held by
    ``distributed/test_processes.py``.
    """
    running = getattr(nn.parallel.DistributedDataParallel, "_get_active_ddp_module", None)
    wrapper = None if running is None else running()
    if wrapper is None or not hasattr(wrapper, "_module_parameters"):
        return None
    return {id(parameter) for parameter in wrapper.module.parameters()} & set(map(id, wrapper._module_parameters))


def accelerate_hooks(module: nn.Module) -> list[Any]:
    """Return the hooks by which accelerate moves a module or its inputs: its attribute ``_hf_hook``.

    Held by ``modules/test_private.py::test_accelerates_hooks_are_found``.
    """
    hook = getattr(module, "_hf_hook", None)
    return list(getattr(hook, "hooks", [] if hook is None else [hook]))


def offloaded_values(module: nn.Module) -> dict[str, Tensor]:
    """Return those of a module's own parameters that accelerate has offloaded, on the device where the module runs.

    accelerate's hooks keep the values in ``weights_map``. Held by
    ``modules/test_private.py::test_what_accelerate_has_offloaded_is_found_where_it_keeps_it``.
    """
    offloaded = [name for name, value in module.named_parameters(recurse=False) if value.is_meta]
    values: dict[str, Tensor] = {}
    for hook in accelerate_hooks(module) if offloaded else ():
        weights = getattr(hook, "weights_map", None)
        if weights is not None and getattr(hook, "offload", False):
            values |= {name: weights[name].to(hook.execution_device) for name in offloaded if name in weights}
    return values


def is_cache(value: Any) -> bool:
    """Return whether an argument of a call is a cache of transformers, whatever it is called.

    Held by ``modules/test_private.py::test_a_cache_is_found_by_what_it_is``.
    """
    # Not isinstance: transformers isn't imported, and wrappers of caches have the method too.
    return callable(getattr(value, "get_seq_length", None)) and not isinstance(value, (type, nn.Module))


def cache_names_to_bridge(kind: type[nn.Module]) -> dict[str, str]:
    """Return names by which transformers may pass a cache and this ``forward`` takes none, each with the one it takes.

    transformers 5.24 passes ``cache``, which classes written for older releases, such as LLaVA's own, don't know. It
    still understands the name by which they pass a cache to their base class.

    Held by ``modules/test_private.py::test_generate_passes_a_cache_by_a_name_that_is_known``.
    """
    parameters = inspect.signature(kind.forward).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return {}
    accepted = next((name for name in _CACHE_NAMES if name in parameters), None)
    return {} if accepted is None else {name: accepted for name in _CACHE_NAMES if name not in parameters}


def has_compiled_code() -> bool:
    """Return whether ``torch.compile`` has compiled anything in this process.

    Reads ``torch._dynamo.convert_frame.output_codes``, PyTorch's list of what it has compiled. True in a release that
    has none. Held by ``patching/test_wrapped.py::test_what_was_compiled_is_kept_where_nothing_is_patched``.
    """
    frames: Any = sys.modules.get("torch._dynamo.convert_frame")
    return frames is not None and bool(getattr(getattr(frames, "output_codes", None), "seen", True))


def forget_compiled_code() -> None:
    """Make ``torch.compile`` compile everything anew from now on.

    At each call it checks nearly everything that its code depends on, but for speed not the hooks
    (``torch._dynamo.config.skip_nnmodule_hook_guards``): code made before a model had hooks would go on without them.
    """
    if has_compiled_code():
        torch.compiler.reset()


def running_trainer() -> Any:
    """Return the ``transformers.Trainer`` whose ``train`` or ``save_model`` this thread runs, or None.

    Trainer tells a model neither that training starts nor where checkpoints will go. It is found as the first argument
    of these two methods, and only its public attributes are used. Without it, what is checked at the start would show
    only when the first checkpoint is written.

    Held by ``modules/test_private.py::test_a_running_trainer_is_found`` and ``checkpoints/test_output_folders.py``.
    """
    module: Any = sys.modules.get("transformers.trainer")
    frame = sys._getframe(1) if module is not None else None
    while frame is not None:
        # Only these frames: until Python 3.13, whoever reads a frame's variables keeps them alive.
        if frame.f_globals.get("__name__") == module.__name__ and frame.f_code.co_name in ("train", "save_model"):
            first = frame.f_locals.get(frame.f_code.co_varnames[0])
            if isinstance(first, module.Trainer):
                return first
        frame = frame.f_back
    return None


def is_being_called(module: nn.Module) -> bool:
    """Return whether this thread is in a call of a module: in ``torch.nn.Module._call_impl``.

    PyTorch runs no hooks after an interrupt, which would tell that a call has ended.

    Held by ``modules/test_private.py::test_a_call_of_a_module_is_noticed``.
    """
    code = nn.Module._call_impl.__code__
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is code and frame.f_locals.get("self") is module:
            return True
        if frame.f_code.co_name.startswith("torch_dynamo_resume_in_"):
            # The rest of a compiled function after a break of its graph, which may be that call's.
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


class LeftOutOfSaves(Set[str]):
    """The names that transformers leaves out of a save, worked out whenever they are read.

    ``_keys_to_ignore_on_save`` of ``PreTrainedModel``. ``Trainer`` compares it with the keys that it misses in a
    checkpoint, and warns where they differ. Without it, resuming from a checkpoint of the adapter alone would warn.

    Held by ``adapter/test_trainer.py::test_resume_is_exact``.
    """

    def __init__(self, before: Any, names: Callable[[], set[str] | None]) -> None:
        self.before = before
        self.names = names

    def _now(self) -> set[str]:
        names = self.names()
        return set(self.before or ()) if names is None else names

    def __contains__(self, name: object) -> bool:
        return name in self._now()

    def __iter__(self) -> Iterator[str]:
        return iter(self._now())

    def __len__(self) -> int:
        return len(self._now())


def leave_out_of_saves(model: nn.Module, names: Callable[[], set[str] | None]) -> None:
    """Make transformers expect that a checkpoint lacks ``names()``; None means what it expected before."""
    model.__dict__[_IGNORED_ON_SAVE] = LeftOutOfSaves(model.__dict__.get(_IGNORED_ON_SAVE), names)


def expect_whole_saves(model: nn.Module) -> LeftOutOfSaves | None:
    """Undo :func:`leave_out_of_saves`, and return what it had set."""
    present = model.__dict__.get(_IGNORED_ON_SAVE)
    if not isinstance(present, LeftOutOfSaves):
        return None
    del model.__dict__[_IGNORED_ON_SAVE]
    if present.before is not None:
        model.__dict__[_IGNORED_ON_SAVE] = present.before
    return present


@contextmanager
def whole_saves(model: nn.Module) -> Iterator[None]:
    """Make ``model.save_pretrained`` leave out, in the block, what it leaves out of a model that isn't patched."""
    left_out = expect_whole_saves(model)
    try:
        yield
    finally:
        if left_out is not None:
            model.__dict__[_IGNORED_ON_SAVE] = left_out


def has_peft_adapters(model: nn.Module) -> bool:
    """Return whether ``model.add_adapter`` has put an adapter of PEFT into a model.

    Of such a model, ``model.save_pretrained`` writes the adapter only. ``_hf_peft_config_loaded`` of
    ``PreTrainedModel``.

    Held by ``adapter/test_trainer.py::test_lora_by_add_adapter``.
    """
    return getattr(model, _HAS_PEFT_ADAPTERS, False) is True


class HasTrainableAdapters:
    """The value of ``_hf_peft_config_loaded`` of a patched model whose base is quantized.

    transformers reads that attribute for two questions. ``Trainer`` asks when it is made: are there trainable adapters
    on top of the quantized weights? There are if one of ``answers`` says so. All others ask: is there an adapter of
    PEFT? There is none; where there is one, ``add_adapter`` has replaced this by True. Without it, ``Trainer`` refuses
    the model.

    Held by ``patching/test_quantized.py::test_trainer_takes_the_adapter_alone``.
    """

    def __init__(self) -> None:
        #: By the kind of adapter that they are about.
        self.answers: dict[str, Callable[[], bool]] = {}

    def __bool__(self) -> bool:
        if sys._getframe(1).f_globals.get("__name__") not in _TRAINER_MODULES:
            return False
        # All are asked: being asked, an adapter learns that there is a Trainer.
        return True in [answer() for answer in self.answers.values()]


def answer_trainer(model: nn.Module, about: str, answer: Callable[[], bool]) -> None:
    """Let ``answer()`` tell ``Trainer`` whether the quantized model has trainable adapters of one kind."""
    if getattr(model, "is_quantized", False) and not has_peft_adapters(model):
        present = model.__dict__.get(_HAS_PEFT_ADAPTERS)
        if not isinstance(present, HasTrainableAdapters):
            present = model.__dict__[_HAS_PEFT_ADAPTERS] = HasTrainableAdapters()
        present.answers[about] = answer


def stop_answering_trainer(model: nn.Module, about: str) -> None:
    """Undo :func:`answer_trainer`."""
    present = model.__dict__.get(_HAS_PEFT_ADAPTERS)
    if isinstance(present, HasTrainableAdapters):
        present.answers.pop(about, None)
        if not present.answers:
            del model.__dict__[_HAS_PEFT_ADAPTERS]


def may_be_trained_through(model: Any) -> bool:
    """Return whether gradients pass through the quantized layers of a model: ``hf_quantizer.is_trainable``."""
    return bool(getattr(getattr(model, "hf_quantizer", None), "is_trainable", True))


def remove_replaced_forwards(module: nn.Module) -> None:
    """Remove from a copy of a module what other tools, accelerate among them, have put on the instances.

    Their ``forward`` would go on calling the module that it was made for.

    Held by ``modules/test_private.py::test_a_copy_of_a_dispatched_module_runs_by_itself``.
    """
    for part in module.modules():
        for name in _REPLACED_FORWARD:
            part.__dict__.pop(name, None)


def view_of(
    module: nn.Module, modules: dict[str, nn.Module], parameters: dict[str, Tensor], **attributes: Any
) -> nn.Module:
    """Return a second instance that has these children and parameters, and shares the rest with ``module``.

    It has no hooks.

    PyTorch keeps a module's parts in ``_modules`` and ``_parameters``, and finds a replaced ``forward`` (accelerate's,
    say) on the instance. Held by ``modules/test_private.py::test_a_view_shares_all_but_what_is_given``.
    """
    view = object.__new__(type(module))
    shared = vars(module)
    for name, value in shared.items():
        if name not in _REPLACED_FORWARD:
            # Emptied rather than left out: every release of PyTorch has other dictionaries of hooks.
            view.__dict__[name] = type(value)() if "_hooks" in name and isinstance(value, dict) else value
    view.__dict__["_modules"] = {**shared["_modules"], **modules}
    view.__dict__["_parameters"] = {**shared["_parameters"], **parameters}
    view.__dict__.update(attributes)
    return view


def checkpointed_with_cache() -> dict[str, Any]:
    """Return the attributes by which transformers' ``GradientCheckpointingLayer`` keeps a cache that it only reads.

    With them it is recomputed by PyTorch's non-reentrant function: the reentrant one would go through the cache's graph
    once for each layer.

    Held by ``unified/test_training.py::test_gradient_checkpointing_changes_no_gradient``.
    """
    recompute = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
    return {"_can_checkpoint_with_cache": True, "_gradient_checkpointing_func": recompute}


def cache_argument(kind: type[nn.Module]) -> str:
    """Return the name by which this class's ``forward`` takes a cache.

    Held by ``modules/test_private.py::test_the_cache_of_a_decoder_has_a_name``.
    """
    parameters = inspect.signature(kind.forward).parameters
    return next((name for name in _CACHE_NAMES if name in parameters), _CACHE_NAMES[-1])


def cache_of(output: Any) -> Any:
    """Return the cache in a model's output, whatever it is called; None if there is none.

    Held by ``modules/test_private.py::test_the_cache_of_a_decoder_has_a_name``.
    """
    return next((output[name] for name in _CACHE_NAMES if output.get(name) is not None), None)


def with_attention(config: Any, implementation: str) -> Any:
    """Return a copy of a config with another implementation of attention: ``_attn_implementation``.

    Held by ``modules/test_private.py::test_a_config_is_copied_with_another_attention``.
    """
    config = copy.copy(config)
    config._attn_implementation = implementation
    return config


def attention_of(config: Any) -> str:
    """Return the implementation of attention that a config asks for: ``_attn_implementation``.

    Held by ``modules/test_private.py::test_a_config_is_copied_with_another_attention``.
    """
    return str(getattr(config, "_attn_implementation", None) or "eager")
