"""patch_model, unpatch_model and the EmmaAdapter handle."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from . import (
    attachment,
    base_saves,
    hub,
    named,
    precision,
    private,
    pushing,
    saving,
    sharding,
    starting,
    training,
    tuners,
    wrappers,
)
from .alignment import EmmaAlignment
from .config import EmmaConfig
from .errors import PatchError
from .families import find_family, require_model
from .fitting import make_pipeline, make_reader, resolve_encoder, resolve_sizes
from .fusion.dispatch import KernelUse
from .guards import MethodGuard, guard_features, guard_generate, guard_replication
from .hooks import install_call_hooks, remove_hooks
from .instructions.cache import CacheInfo
from .instructions.tokens import Instruction, embedder
from .state import DEFAULT, STATE_ATTRIBUTE, AdapterState, state_of
from .surroundings import undisturbed
from .wrappers import base_of


@undisturbed()
def patch_model(
    model: nn.Module,
    config: EmmaConfig | None = None,
    *,
    processor: Any = None,
    instruction_encoder: str | nn.Module | None = None,
) -> EmmaAdapter:
    """Make a vision-language model instruction-aware, in place.

    The model answers bit for bit as before until the adapter is trained, and again after ``unpatch_model``.

    Args:
        model: a transformers model of a supported family (a ``PeftModel``, or what ``torch.compile`` returned, is
            patched at the model inside).
        config: what adapter; every size left None is read off the model. Default: ``EmmaConfig()``.
        processor: the model's processor or tokenizer. Without it the instruction is the whole prompt, answers
            and special tokens excluded; with it, the user's turns, or with a warning the whole prompt, if its chat
            template doesn't show them. Text towers need it to read prompts.
        instruction_encoder: overrides ``config.instruction_encoder``; also a module of your own that follows
            :class:`~emma_adapter.InstructionEncoder`.

    Raises:
        UnsupportedModelError: for an unknown family, or a fusion that can't work on this vision tower.
        PatchError: if the model is patched already, wrapped for several processes, or shares its projector with
            another patched model.
        ConfigError: if a size in ``config`` contradicts the model or the encoder.
        EncoderError: if the instruction encoder can't be loaded.
    """
    require_model(model)
    around = wrappers.around(model)
    if any(map(wrappers.knows_its_parameters, around)) or sharding.is_fully_sharded(model):
        raise PatchError(
            "the model is wrapped in DistributedDataParallel, DeepSpeed's engine or AveragedModel, or sharded by FSDP, "
            "which would never learn of the adapter's parameters: patch_model or load_adapter first, then wrap"
        )
    model = base_of(model)
    family = find_family(model)
    if hasattr(model, STATE_ATTRIBUTE):
        raise PatchError(
            "this model is already patched; use get_adapter(model) for its adapter, or unpatch_model(model) first"
        )
    inner = family.inner(model)
    attachment.check_unshared(inner, family.projector(inner), *family.deepstack_projectors(inner))
    config = EmmaConfig() if config is None else config
    # The encoder last: it may be large, and what is wrong with the sizes shows without it.
    config = resolve_sizes(config, family, inner)
    config, encoder = resolve_encoder(config, instruction_encoder, inner)
    pipeline = make_pipeline(config, make_reader(model, config, processor), encoder)
    state = AdapterState(family, config, pipeline, model)
    alignments = named.make_alignments(family, config, inner)

    install(model, state, alignments, around)
    return EmmaAdapter(model)


def install(
    model: nn.Module, state: AdapterState, alignments: Mapping[str, EmmaAlignment], around: Sequence[nn.Module] = ()
) -> None:
    """Put an adapter on a model, and what guards it on the wrappers around the model."""
    family = state.family
    inner = family.inner(model)
    for module in (model, inner):
        setattr(module, STATE_ATTRIBUTE, state)
    named.attach(model, DEFAULT, alignments)
    install_call_hooks(model, inner)
    MethodGuard.install(model, "generate", guard_generate)
    MethodGuard.install(model, "save_pretrained", base_saves.guard_save_pretrained)
    # Of a part, which the model holds: build().train() would be left with nothing but its guard.
    MethodGuard.install(family.projector(inner) if inner is model else inner, "train", starting.guard_train)
    base_saves.expect_checkpoints(model)
    starting.expect_trainer(model)
    precision.remember_weights(model)
    for module in dict.fromkeys((model, inner)):
        MethodGuard.install(module, private.REPLICATE, guard_replication)
    for modality in family.modalities:
        method = family.feature_methods.get(modality)
        if method is not None and hasattr(inner, method):
            MethodGuard.install(inner, method, functools.partial(guard_features, modality))
    pushing.install(model)
    tuners.guard_wrappers(around)
    private.forget_compiled_code()


@undisturbed()
def unpatch_model(model: nn.Module) -> None:
    """Take the adapter off again; what is left is the original model, bit for bit.

    Raises:
        PatchError: if the model is not patched, or was sharded since.
    """
    around, model = wrappers.around(model), base_of(model)
    state = state_of(model)
    if sharding.is_fully_sharded(model):
        raise PatchError(
            "FSDP has sharded the model with the adapter in it, which can't be taken out any more; "
            "with adapter.disabled(): … is the original model"
        )
    training.undo_train_only(model)
    private.expect_whole_saves(model)
    private.stop_answering_trainer(model)
    # Every module, not just the patched ones: other tools copy projectors, hooks and all.
    modules = set(model.modules())
    with contextlib.suppress(PatchError):
        # A shallow copy (copy.copy) shares all that the model which it was made of has, but not its attributes.
        modules.add(state.model)
    for module in [module for module in modules if module.__dict__.get(STATE_ATTRIBUTE) is state]:
        for guard in [value for value in module.__dict__.values() if isinstance(value, MethodGuard)]:
            guard.remove(module)
        remove_hooks(module)
        attachment.detach(module)
    tuners.release_wrappers(around)
    private.forget_compiled_code()


def get_adapter(model: nn.Module) -> EmmaAdapter:
    """The handle of a patched model, also of a copy of one, or of what other tools have wrapped around it.

    Raises:
        PatchError: if the model is not patched.
    """
    model = base_of(model)
    state_of(model)
    return EmmaAdapter(model)


class EmmaAdapter:
    """Handle on the adapter of one patched model. It holds no state of its own: any number may exist."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters on this model. Everything else that this handle tells or does concerns the active one."""
        return tuple(self._state.adapters)

    @property
    def active(self) -> str:
        """Name of the adapter that the model's calls go through. ``patch_model`` makes ``"default"``."""
        return self._state.active

    @undisturbed()
    def add(
        self,
        name: str,
        config: EmmaConfig | None = None,
        *,
        processor: Any = None,
        instruction_encoder: str | nn.Module | None = None,
    ) -> EmmaAdapter:
        """Put another adapter on the model, of its own kind and frozen until ``set_active(name)``.

        Args:
            name: letters, digits and underscores.
            config: as for :func:`patch_model`.
            processor: as for :func:`patch_model`; default: prompts are read as by the active adapter.
            instruction_encoder: as for :func:`patch_model`.

        Raises:
            PatchError: if the name is taken or can't be one.
        """
        named.add(self.model, name, EmmaConfig() if config is None else config, processor, instruction_encoder)
        return self

    @undisturbed()
    def set_active(self, name: str) -> EmmaAdapter:
        """Have calls go through another of the model's adapters, and the projector trained with it, if one was.

        It becomes trainable if the one before was; that one is frozen. Not while a call of the model is running.

        Raises:
            PatchError: if there is no adapter of that name.
        """
        named.activate(self.model, name)
        return self

    def remove(self, name: str) -> EmmaAdapter:
        """Take an adapter off again that isn't the active one.

        Raises:
            PatchError: if it is, or if there is none of that name.
        """
        named.remove(self.model, name)
        return self

    @property
    def config(self) -> EmmaConfig:
        """The config with every size filled in."""
        return self._state.config

    @property
    def alignment(self) -> EmmaAlignment:
        """The trainable module at the projector."""
        return attachment.alignments(self.model)[attachment.MAIN_PLACE]

    def disabled(self) -> AbstractContextManager[None]:
        """``with adapter.disabled(): …`` is the original model, bit for bit, in this thread or asynchronous task."""
        return self._state.disabled()

    def instruction(
        self, instruction: Instruction, instruction_mask: Tensor | None = None
    ) -> AbstractContextManager[None]:
        """``with adapter.instruction("…"): …``: the instruction of every call in the block that names none itself, in
        this thread or asynchronous task: one for all rows, or one for each. Also for direct calls to the vision side,
        as ``model.get_image_features``, which have no prompt: one for all images, or one for each."""
        state = self._state
        inner = state.family.inner(self.model)
        if state.pipeline.encoder is None and sharding.is_fully_sharded(self.model):
            raise PatchError(
                "the language model's embeddings are sharded and can be read within a call only: pass the instruction "
                "to the call, model(**inputs, instruction=…)"
            )
        device = next(self.parameters()).device
        tokens = state.pipeline.explicit(instruction, instruction_mask, None, embedder(inner), device)
        return state.naming(tokens)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The adapter's parameters, float32 unless the model was cast after patching."""
        return iter(attachment.named_parameters(self.model).values())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters by their name in the adapter, which doesn't depend on where it sits in the model."""
        return iter(attachment.named_parameters(self.model).items())

    def num_parameters(self) -> int:
        """How many numbers the adapter has learned or can learn."""
        return training.count_parameters(self.model)[0]

    @undisturbed()
    def train_only(self, *, projector: bool = False) -> EmmaAdapter:
        """Freeze everything but the adapter, and with ``projector=True`` but the projector.

        As long as nothing else is made trainable, Trainer's checkpoints hold the adapter only; else the whole model.

        Raises:
            PatchError: if the projector can't be trained with the adapter: it is quantized, sharded, or wrapped by
                PEFT. Nothing is changed then.
        """
        training.train_only(self.model, projector=projector)
        starting.expect_trainer(self.model)
        return self

    def unfreeze(self) -> EmmaAdapter:
        """Make trainable again what ``train_only`` has frozen, for a second stage in which everything is trained.

        A projector that was trained with the adapter still belongs to it. Does nothing without ``train_only`` before.
        """
        training.unfreeze(self.model)
        return self

    def regroup(
        self,
        optimizer: torch.optim.Optimizer,
        lr: float,
        *,
        projector_lr: float | None = None,
        weight_decay: float = 0.0,
    ) -> EmmaAdapter:
        """Move the adapter's parameters to groups of their own, in an optimizer that another tool has made.

        Such a tool sorts parameters by rules that are made for something else: LoRA+ gives the adapter's norms and
        biases the rate of ``lora_B``, sixteen times that of its other weights.

        Args:
            optimizer: before its first step, and before a scheduler is made for it.
            lr: as for :meth:`parameter_groups`, and so the others.
            projector_lr: see there.
            weight_decay: see there.

        Raises:
            ConfigError: if a rate is no number or negative, or the optimizer was used already.
        """
        training.regroup(self.model, optimizer, lr, projector_lr=projector_lr, weight_decay=weight_decay)
        return self

    def parameter_groups(
        self, lr: float, *, projector_lr: float | None = None, weight_decay: float = 0.0
    ) -> list[dict[str, Any]]:
        """Groups for an optimizer; the projector's own, at ``projector_lr`` (default ``lr``), if it is trained with the
        adapter: after ``train_only(projector=True)``."""
        return training.parameter_groups(self.model, lr, projector_lr=projector_lr, weight_decay=weight_decay)

    def save_pretrained(
        self,
        directory: str | PathLike[str],
        *,
        is_main_process: bool | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write ``adapter_config.json``, ``adapter_model.safetensors`` and a model card, atomically.

        Whenever it is killed, ``load_adapter`` finds the adapter that was there before, or the new one; what is left
        over is removed by the next save. Several processes and threads may save to one folder, and load from it.

        Of several processes, rank 0 writes. Weights that FSDP2 has sharded are gathered first: then every process must
        call this, and none goes on before the files are there. Without sharding there is nothing to wait for, and
        rank 0 may call it alone.

        Args:
            directory: the folder, made if it isn't there. Where it holds a model that transformers loads, the adapter
                goes into ``emma_adapter/`` in it, where ``load_adapter(model, directory)`` finds it: among the model's
                files, its config would make transformers take the model for an adapter of PEFT.
            is_main_process: whether this process writes, if not rank 0 should.
            state_dict: of the model, gathered: ``accelerator.get_state_dict(model)``. The weights are taken from it
                where they aren't whole here, and nobody waits for others.

        Raises:
            OSError: if the folder can't be written, or holds an adapter of another tool. What it held is intact; the
                message tells if it is the new adapter already, and only its config file or card couldn't be written.
            CheckpointError: if weights are NaN or infinite, as after a training that diverged.
            PatchError: if the weights are held by something that only gathers them itself, as DeepSpeed ZeRO-3.
        """
        saving.save(self.model, directory, is_main_process=is_main_process, gathered=state_dict)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload EMMA adapter",
        token: str | bool | None = None,
        create_pr: bool = False,
    ) -> str:
        """Upload what ``save_pretrained`` writes to ``repo_id`` on the hub, which is made if there is none.

        Args:
            repo_id: ``"user/name"``. If it holds a model, the adapter goes into ``emma_adapter/`` there.
            private: whether a repository that is made now is private; default: as the user's or organisation's is.
            revision: branch, made if there is none.
            commit_message: of the upload.
            token: of the hub; default, and with True: the one that ``hf auth login`` stored, or ``HF_TOKEN``.
            create_pr: open a pull request instead of committing.

        Returns:
            The address of the commit.

        Raises:
            FileExistsError: if the repository holds an adapter of another tool, as a LoRA.
            huggingface_hub.errors.HfHubHTTPError: if the hub refuses.
        """
        return hub.push(
            self.model,
            repo_id,
            private=private,
            revision=revision,
            commit_message=commit_message,
            token=token,
            create_pr=create_pr,
        )

    def kernel_report(self) -> tuple[KernelUse, ...]:
        """What computed the calls so far, PyTorch's operations or the Triton kernels, and why; one entry for each kind
        of call: ``print(*adapter.kernel_report(), sep="\\n")``."""
        return tuple(
            use for alignment in attachment.alignments(self.model).values() for use in alignment.kernel_report()
        )

    def cache_info(self) -> CacheInfo:
        """Hits, misses and size of the cache of encoded instructions. ``"llm"`` looks embeddings up, uncached."""
        encoder = self._state.pipeline.encoder
        return CacheInfo(0, 0, 0, 0) if encoder is None else encoder.info()

    def clear_cache(self) -> None:
        """Forget all encoded instructions, and count hits and misses from zero."""
        encoder = self._state.pipeline.encoder
        if encoder is not None:
            encoder.clear_cache()

    @property
    def _state(self) -> AdapterState:
        return state_of(self.model)

    def __repr__(self) -> str:
        own, total = training.count_parameters(self.model)
        config: Any = self.model.config
        info = self.cache_info()
        names = "" if len(self.names) == 1 else f"active={self.active!r} of {list(self.names)}, "
        return (
            f"EmmaAdapter({names}family={config.model_type!r}, fusion={self.config.fusion!r}, "
            f"instruction_encoder={self.config.instruction_encoder!r}, parameters={own:,} "
            f"({own / total:.3%} of the model), cache_hits={info.hits}, cache_misses={info.misses})"
        )
