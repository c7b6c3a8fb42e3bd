"""``EmmaAdapter``, the handle by which a user works with the adapters of a patched model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from ..alignment.config import EmmaConfig
from ..alignment.fusion.dispatch import KernelUse
from ..alignment.module import EmmaAlignment
from ..checkpoints import hub, writing
from ..errors import PatchError
from ..instructions.cache import CacheInfo
from ..instructions.pipeline import Instruction, embedder
from ..modules import sharding
from ..modules.torch_modes import undisturbed
from ..modules.wrappers import base_of
from ..patching import sites, trainable_parameters
from ..patching.state import AdapterState, state_of
from . import named_adapters, training_start


def get_adapter(model: nn.Module) -> EmmaAdapter:
    """Return the handle of a patched model, which may also be a copy of one, or wrapped by other tools.

    Raises:
        PatchError: if the model is not patched.
    """
    model = base_of(model)
    state_of(model)
    return EmmaAdapter(model)


class EmmaAdapter:
    """Handle on the adapters of one patched model. It holds no state of its own: any number may exist."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the adapters on this model. All else that this handle says or does concerns the active one."""
        return tuple(self._state.adapters)

    @property
    def active_adapter(self) -> str:
        """Name of the adapter that the model's calls go through. ``patch_model`` makes ``"default"``."""
        return self._state.active

    @undisturbed()
    def add_adapter(
        self,
        name: str,
        config: EmmaConfig | None = None,
        *,
        processor: Any = None,
        instruction_encoder: str | nn.Module | None = None,
    ) -> EmmaAdapter:
        """Put another adapter on the model, of its own kind and frozen until ``set_adapter(name)``.

        Args:
            name: letters, digits and underscores.
            config: as for :func:`patch_model`.
            processor: as for :func:`patch_model`; default: prompts are read as by the active adapter.
            instruction_encoder: as for :func:`patch_model`.

        Raises:
            PatchError: if the name is taken or can't be one.
        """
        named_adapters.add(self.model, name, EmmaConfig() if config is None else config, processor, instruction_encoder)
        return self

    @undisturbed()
    def set_adapter(self, name: str) -> EmmaAdapter:
        """Have calls go through another of the model's adapters, and through the projector trained with it, if any.

        It becomes trainable if the one before was; that one is frozen. Not while a call of the model is running.

        Raises:
            PatchError: if there is no adapter of that name.
        """
        named_adapters.activate(self.model, name)
        return self

    def delete_adapter(self, name: str) -> EmmaAdapter:
        """Take an adapter, other than the active one, off the model.

        Raises:
            PatchError: if it is the active one, or if there is none of that name.
        """
        named_adapters.remove(self.model, name)
        return self

    @property
    def config(self) -> EmmaConfig:
        """The config with every size filled in."""
        return self._state.config

    @property
    def alignment(self) -> EmmaAlignment:
        """The trainable module at the projector."""
        return self._state.current.alignments()[sites.MAIN_PLACE]

    @property
    def projector(self) -> nn.Module | None:
        """The copy of the model's projector that is trained with the adapter; None if it goes through the model's."""
        own_projectors = self._state.current.own_projectors()
        return own_projectors[sites.MAIN_PLACE].projector if own_projectors else None

    def disable_adapter(self) -> AbstractContextManager[None]:
        """Return a context in which the model is the original, bit for bit: ``with adapter.disable_adapter(): …``.

        It holds in this thread or asynchronous task.
        """
        return self._state.disabled()

    def instruction(
        self, instruction: Instruction, instruction_mask: Tensor | None = None
    ) -> AbstractContextManager[None]:
        """Return a context in which calls that name no instruction have this one: ``with adapter.instruction("…"): …``.

        It holds in this thread or asynchronous task. The instruction is one for all rows, or one for each. It is also
        that of direct calls to the vision side, such as ``model.get_image_features``, which have no prompt: one for
        all images, or one for each.
        """
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
        """Return the adapter's parameters, float32 unless the model was cast after patching."""
        return iter(self._state.current.named_parameters().values())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Return parameters by their name in the adapter, which doesn't depend on where it sits in the model."""
        return iter(self._state.current.named_parameters().items())

    def num_parameters(self) -> int:
        """Return the total size of the adapter's parameters, trainable or frozen."""
        return trainable_parameters.count_parameters(self.model)[0]

    @undisturbed()
    def train_only(self, *, projector: bool = False) -> EmmaAdapter:
        """Freeze everything but the adapter and, with ``projector=True``, a projector of its own.

        As long as nothing else is made trainable, Trainer's checkpoints hold only the adapter; else the whole model.

        Raises:
            PatchError: if the projector can't be trained with the adapter: it is quantized, sharded, or wrapped by
                PEFT. Nothing is changed then.
        """
        trainable_parameters.train_only(self.model, projector=projector)
        training_start.expect_trainer(self.model)
        return self

    def unfreeze(self) -> EmmaAdapter:
        """Make trainable again what ``train_only`` has frozen, for a second stage in which everything is trained.

        A projector that was trained with the adapter still belongs to it. Does nothing if ``train_only`` wasn't called.
        """
        trainable_parameters.unfreeze(self.model)
        return self

    def regroup(
        self,
        optimizer: torch.optim.Optimizer,
        lr: float,
        *,
        projector_lr: float | None = None,
        weight_decay: float = 0.0,
    ) -> EmmaAdapter:
        """Move the adapter's parameters to groups of their own in an optimizer that another tool has made.

        Such a tool groups parameters by rules that are made for something else: LoRA+ gives the adapter's norms and
        biases the rate of ``lora_B``, sixteen times that of its other weights.

        Args:
            optimizer: an optimizer that has made no step, and has no scheduler yet.
            lr: as for :meth:`parameter_groups`.
            projector_lr: as for :meth:`parameter_groups`.
            weight_decay: as for :meth:`parameter_groups`.

        Raises:
            ConfigError: if a rate is no number or negative, or the optimizer was used already.
        """
        trainable_parameters.regroup(self.model, optimizer, lr, projector_lr=projector_lr, weight_decay=weight_decay)
        return self

    def parameter_groups(
        self, lr: float, *, projector_lr: float | None = None, weight_decay: float = 0.0
    ) -> list[dict[str, Any]]:
        """Return parameter groups for an optimizer.

        After ``train_only(projector=True)`` the adapter's own projector has a group too, at ``projector_lr`` (default
        ``lr``).
        """
        return trainable_parameters.parameter_groups(
            self.model, lr, projector_lr=projector_lr, weight_decay=weight_decay
        )

    def save_pretrained(
        self,
        directory: str | PathLike[str],
        *,
        is_main_process: bool | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write ``adapter_config.json``, ``adapter_model.safetensors`` and a model card, atomically.

        If it is killed at any moment, ``load_adapter`` finds the adapter that was there before, or the new one; the
        next save removes what is left over. Several processes and threads may save to one folder, and load from it.

        Of several processes, rank 0 writes. Weights that FSDP2 has sharded are gathered first: then every process must
        call this, and none continues before the files are there. Without sharding there is nothing to wait for, and
        rank 0 may call it alone.

        Args:
            directory: the folder, made if it isn't there. Where it holds a model that transformers loads, the adapter
                goes into ``emma_adapter/`` in it, where ``load_adapter(model, directory)`` finds it: among the model's
                files, its config would make transformers take the model for an adapter of PEFT.
            is_main_process: whether this process writes; default: rank 0 does.
            state_dict: the model's gathered state, ``accelerator.get_state_dict(model)``. The weights are taken from
                it where they aren't whole here, and no process waits for others.

        Raises:
            OSError: if the folder can't be written, or holds an adapter of another tool. What it held is intact; the
                message says so if the new adapter is there already, and only its config file or card isn't written.
            CheckpointError: if weights are NaN or infinite, as after a training that diverged.
            PatchError: if the weights are held by something that alone can gather them, such as DeepSpeed ZeRO-3.
        """
        writing.save(self.model, directory, is_main_process=is_main_process, gathered=state_dict)

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
            private: whether a repository that is made now is private; default: as the user or organisation has set.
            revision: branch, made if there is none.
            commit_message: message of the upload's commit.
            token: token for the hub; default, and with True: the one that ``hf auth login`` stored, or ``HF_TOKEN``.
            create_pr: open a pull request instead of committing.

        Returns:
            The address of the commit.

        Raises:
            FileExistsError: if the repository holds an adapter of another tool, such as a LoRA.
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
        """Return what computed the calls so far, PyTorch's operations or the Triton kernels, and why.

        There is one entry for each kind of call: ``print(*adapter.kernel_report(), sep="\\n")``.
        """
        alignments = self._state.current.alignments().values()
        return tuple(use for alignment in alignments for use in alignment.kernel_report())

    def cache_info(self) -> CacheInfo:
        """Return hits, misses and size of the cache of encoded instructions; ``"llm"`` does without a cache."""
        encoder = self._state.pipeline.encoder
        return CacheInfo(0, 0, 0, 0) if encoder is None else encoder.info()

    def clear_cache(self) -> None:
        """Forget all encoded instructions, and count hits and misses from zero."""
        encoder = self._state.pipeline.encoder
        if encoder is not None:
            encoder.clear_cache()

    # The names of earlier releases, kept for one more.
    active = active_adapter
    add, set_active, remove, disabled = add_adapter, set_adapter, delete_adapter, disable_adapter

    @property
    def _state(self) -> AdapterState:
        return state_of(self.model)

    def __repr__(self) -> str:
        size, total = trainable_parameters.count_parameters(self.model)
        config: Any = self.model.config
        info = self.cache_info()
        names = "" if len(self.names) == 1 else f"active={self.active_adapter!r} of {list(self.names)}, "
        return (
            f"EmmaAdapter({names}family={config.model_type!r}, fusion={self.config.fusion!r}, "
            f"instruction_encoder={self.config.instruction_encoder!r}, parameters={size:,} "
            f"({size / total:.3%} of the model), cache_hits={info.hits}, cache_misses={info.misses})"
        )
