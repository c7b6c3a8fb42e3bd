"""patch_model, unpatch_model and the EmmaAdapter handle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from . import base_saves, checkpoint, hub, training
from .alignment import EmmaAlignment
from .config import EmmaConfig
from .errors import CheckpointError, ConfigError, PatchError, UnsupportedModelError
from .families import ModelFamily, find_family
from .fusion import fusion_class
from .hooks import MethodGuard, guard_generate, install_hooks, remove_hooks
from .instructions.cache import CacheInfo
from .instructions.encoders import CachedEncoder, build_encoder, check_protocol, encoder_name
from .instructions.extraction import InstructionReader
from .instructions.tokens import LLM, Instruction, InstructionPipeline, embedder
from .state import ALIGNMENT_NAME, STATE_ATTRIBUTE, AdapterState, CallPlan, state_of

_LLM_MAX_INSTRUCTION_TOKENS = 128
_GUARDED_METHODS = {"generate": guard_generate, "save_pretrained": base_saves.guard_save_pretrained}


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
        model: a transformers model of a supported family (a ``PeftModel`` is patched at its base model).
        config: what adapter; every size left None is read off the model. Default: ``EmmaConfig()``.
        processor: the model's processor or tokenizer. Without it the instruction is the whole prompt, answers
            and special tokens excluded; with it, the user's turns. Text towers need it to read prompts.
        instruction_encoder: overrides ``config.instruction_encoder``; also a module of your own that follows
            :class:`~emma_adapter.InstructionEncoder`.

    Raises:
        UnsupportedModelError: for an unknown family, or a fusion that can't work on this vision tower.
        PatchError: if the model is patched already.
        ConfigError: if a size in ``config`` contradicts the model or the encoder.
        EncoderError: if the instruction encoder can't be loaded.
    """
    model = base_of(model)
    family = find_family(model)
    if hasattr(model, STATE_ATTRIBUTE):
        raise PatchError(
            "this model is already patched; use get_adapter(model) for its adapter, or unpatch_model(model) first"
        )
    inner = family.inner(model)
    config = EmmaConfig() if config is None else config
    config, encoder = _resolve_encoder(config, instruction_encoder, inner)
    config = _resolve_sizes(config, family, inner)
    projector = family.projector(inner)
    if isinstance(projector, (nn.Sequential, nn.ModuleList)):
        raise UnsupportedModelError(
            f"the projector of {type(model).__name__} is a {type(projector).__name__}, which would run the adapter as "
            "one of its layers; give the family a projector that is a module of its own"
        )
    reader = InstructionReader(processor, _special_ids(model, family), config.instruction_policy)
    pipeline = _pipeline(config, reader, encoder)
    alignment = EmmaAlignment(config).to(_execution_device(projector)).train(model.training)
    state = AdapterState(family, config, pipeline)

    projector.add_module(ALIGNMENT_NAME, alignment)
    for module in (model, inner, projector):
        setattr(module, STATE_ATTRIBUTE, state)
    install_hooks(model, inner, projector)
    for name, guard in _GUARDED_METHODS.items():
        MethodGuard.install(model, name, guard)
    return EmmaAdapter(model)


def unpatch_model(model: nn.Module) -> None:
    """Take the adapter off again; what is left is the original model, bit for bit.

    Raises:
        PatchError: if the model is not patched.
    """
    model = base_of(model)
    state = state_of(model)
    inner = state.family.inner(model)
    projector = state.family.projector(inner)
    base_saves.expect_everything(model)
    training.reset_projector(model)
    for name in _GUARDED_METHODS:
        guard = model.__dict__.get(name)
        if isinstance(guard, MethodGuard):
            guard.remove(model)
    for module in (model, inner, projector):
        remove_hooks(module)
        delattr(module, STATE_ATTRIBUTE)
    delattr(projector, ALIGNMENT_NAME)


def get_adapter(model: nn.Module) -> EmmaAdapter:
    """The handle of a patched model, also of a copy of one.

    Raises:
        PatchError: if the model is not patched.
    """
    model = base_of(model)
    state_of(model)
    return EmmaAdapter(model)


def load_adapter(
    model: nn.Module,
    source: str | PathLike[str],
    *,
    processor: Any = None,
    instruction_encoder: str | nn.Module | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
) -> EmmaAdapter:
    """Load a saved adapter into a model, which is patched if it isn't yet.

    Args:
        model: as for :func:`patch_model`.
        source: a folder that ``save_pretrained`` wrote, or a hub id.
        processor: as for :func:`patch_model`; an already patched model keeps the one it has, if none is given.
        instruction_encoder: where the adapter's instruction encoder is found now, if elsewhere than when it was
            saved; needed for an encoder module of your own.
        revision: branch, tag or commit on the hub.
        local_files_only: don't ask the hub; use what was downloaded before.

    Raises:
        CheckpointError: if the files are incomplete, damaged, of a newer format, or made for another model. The
            model is then as it was.
        EncoderError: if the instruction encoder can't be loaded.
    """
    model = base_of(model)
    saved = checkpoint.read(hub.local_folder(source, revision=revision, local_files_only=local_files_only))
    _check_fit(model, saved)
    was_patched = hasattr(model, STATE_ATTRIBUTE)
    if not was_patched:
        _check_encoder_fit(model, saved)
        patch_model(model, saved.config, processor=processor, instruction_encoder=instruction_encoder)
    elif not _same_build(state_of(model).config, saved.config, ignore_encoder=instruction_encoder is not None):
        raise PatchError(
            "the model is patched with another kind of adapter than the saved one; unpatch_model(model) first, and "
            f"load_adapter will patch it. Here: {state_of(model).config}; saved: {saved.config}"
        )
    else:
        _refit(model, processor, instruction_encoder)
    if saved.projector:
        training.keep_original_projector(model)
    else:
        training.reset_projector(model)
    training.assign(model, saved.alignment, saved.projector)
    if state_of(model).adapter_only:
        base_saves.expect_adapter_only(model)
    return EmmaAdapter(model)


class EmmaAdapter:
    """Handle on the adapter of one patched model. It holds no state of its own: any number may exist."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    def config(self) -> EmmaConfig:
        """The config with every size filled in."""
        return self._state.config

    @property
    def alignment(self) -> EmmaAlignment:
        """The trainable module."""
        return training.alignment_of(self.model)

    def disabled(self) -> AbstractContextManager[None]:
        """``with adapter.disabled(): …`` is the original model, bit for bit, in this thread."""
        return self._state.disabled()

    def instruction(
        self, instruction: Instruction, instruction_mask: Tensor | None = None
    ) -> AbstractContextManager[None]:
        """``with adapter.instruction("…"): model.get_image_features(…)``: the instruction of direct calls to the
        vision side, which have no prompt. One for all images, or one for each."""
        state = self._state
        inner = state.family.inner(self.model)
        device = next(self.alignment.parameters()).device
        tokens = state.pipeline.explicit(instruction, instruction_mask, None, embedder(inner), device)
        return state.calling(CallPlan(inner, tokens, None, {}), pinned=None)

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.alignment.parameters()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters by their name in the adapter, which doesn't depend on where it sits in the model."""
        return self.alignment.named_parameters()

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def train_only(self, *, projector: bool = False) -> EmmaAdapter:
        """Freeze everything but the adapter, and with ``projector=True`` but the projector.

        From then on Trainer's checkpoints hold the adapter only.
        """
        training.train_only(self.model, projector=projector)
        base_saves.expect_adapter_only(self.model)
        return self

    def parameter_groups(
        self, lr: float, *, projector_lr: float | None = None, weight_decay: float = 0.0
    ) -> list[dict[str, Any]]:
        """Groups for an optimizer; the projector's own, at ``projector_lr`` (default ``lr``), if it is trained."""
        return training.parameter_groups(self.model, lr, projector_lr=projector_lr, weight_decay=weight_decay)

    def save_pretrained(self, directory: str | PathLike[str]) -> None:
        """Write ``adapter_config.json``, ``adapter_model.safetensors`` and a model card, atomically.

        Raises:
            OSError: if the folder can't be written; what it held before is intact.
        """
        checkpoint.save(self.model, directory)

    def cache_info(self) -> CacheInfo:
        """Hits, misses and size of the cache of encoded instructions. ``"llm"`` looks embeddings up, uncached."""
        encoder = self._state.pipeline.encoder
        return CacheInfo(0, 0, 0, 0) if encoder is None else encoder.info()

    def clear_cache(self) -> None:
        encoder = self._state.pipeline.encoder
        if encoder is not None:
            encoder.clear_cache()

    @property
    def _state(self) -> AdapterState:
        return state_of(self.model)

    def __repr__(self) -> str:
        own = self.num_parameters()
        total = sum(parameter.numel() for parameter in self.model.parameters())
        config: Any = self.model.config
        info = self.cache_info()
        return (
            f"EmmaAdapter(family={config.model_type!r}, fusion={self.config.fusion!r}, "
            f"instruction_encoder={self.config.instruction_encoder!r}, parameters={own:,} "
            f"({own / total:.3%} of the model), cache_hits={info.hits}, cache_misses={info.misses})"
        )


def base_of(model: nn.Module) -> nn.Module:
    """The transformers model inside a PeftModel; any other model itself."""
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if callable(get_base_model) else model


def _check_fit(model: nn.Module, saved: checkpoint.SavedAdapter) -> None:
    """That the saved adapter was made for a model like this one, before anything is changed."""
    family = find_family(model)
    inner = family.inner(model)
    config: Any = model.config
    if saved.model_type != config.model_type:
        raise CheckpointError(
            f"{saved.source} was made for model_type {saved.model_type!r}; this model is {config.model_type!r}"
        )
    if saved.config.visual_dim != family.visual_dim(inner):
        raise CheckpointError(
            f"{saved.source} was made for visual tokens of {saved.config.visual_dim} channels; this model's have "
            f"{family.visual_dim(inner)}: it was trained on another vision tower"
        )
    number, _ = family.visual_size(inner)
    if family.has_fixed_size(inner) and saved.config.num_visual_tokens not in (None, number):
        raise CheckpointError(
            f"{saved.source} was made for {saved.config.num_visual_tokens} visual tokens an image; "
            f"this model has {number}"
        )
    if saved.projector:
        found = dict(saved.projector)
        checkpoint.check_tensors(found, training.projector_tensors(family.projector(inner)), saved.source)


def _check_encoder_fit(model: nn.Module, saved: checkpoint.SavedAdapter) -> None:
    if saved.config.instruction_encoder == LLM:
        width = _embedding_dim(find_family(model).inner(model))
        if saved.config.instruction_dim != width:
            raise CheckpointError(
                f"{saved.source} was made for a language model with embeddings of {saved.config.instruction_dim} "
                f"channels; this model's have {width}"
            )


def _same_build(one: EmmaConfig, other: EmmaConfig, *, ignore_encoder: bool) -> bool:
    """True if both have the same weights and read the same instruction, wherever the encoder is found."""
    ignored: dict[str, Any] = {"cache_size": 0}
    if ignore_encoder:
        ignored["instruction_encoder"] = "given"
    return one.replace(**ignored) == other.replace(**ignored)


def _embedding_dim(inner: nn.Module) -> int:
    embeddings: Any = inner.get_input_embeddings()  # type: ignore[operator]
    return int(embeddings.weight.shape[1])


def _pipeline(config: EmmaConfig, reader: InstructionReader, encoder: CachedEncoder | None) -> InstructionPipeline:
    return InstructionPipeline(
        reader=reader,
        encoder=encoder,
        max_instruction_tokens=config.max_instruction_tokens or _LLM_MAX_INSTRUCTION_TOKENS,
        reads_padding=fusion_class(config.fusion).reads_padding,
    )


def _refit(model: nn.Module, processor: Any, instruction_encoder: str | nn.Module | None) -> None:
    """Give a patched model another processor or encoder, where one is given."""
    state = state_of(model)
    reader, encoder = state.pipeline.reader, state.pipeline.encoder
    if processor is not None:
        reader = InstructionReader(processor, _special_ids(model, state.family), state.config.instruction_policy)
    if instruction_encoder is not None:
        state.config, encoder = _resolve_encoder(state.config, instruction_encoder, state.family.inner(model))
    state.pipeline = _pipeline(state.config, reader, encoder)


def _resolve_encoder(
    config: EmmaConfig, given: str | nn.Module | None, inner: nn.Module
) -> tuple[EmmaConfig, CachedEncoder | None]:
    if given is None:
        given = config.instruction_encoder
    if given == LLM:
        return _with_encoder_sizes(config, LLM, _embedding_dim(inner), None), None
    if isinstance(given, str):
        name, module = given, build_encoder(given, config.instruction_layer)
    else:
        module = check_protocol(given)
        name = encoder_name(module)
    encoder = CachedEncoder(module, config.cache_size)
    return _with_encoder_sizes(config, name, encoder.instruction_dim, encoder.max_instruction_tokens), encoder


def _with_encoder_sizes(config: EmmaConfig, name: str, dim: int, context: int | None) -> EmmaConfig:
    _require_agreement("instruction_dim", config.instruction_dim, dim, f"the instruction encoder {name!r}")
    longest = config.max_instruction_tokens
    if longest is None:
        longest = context or _LLM_MAX_INSTRUCTION_TOKENS
    elif context is not None and longest > context:
        raise ConfigError(
            f"EmmaConfig.max_instruction_tokens is {longest}, but {name!r} reads at most {context} tokens"
        )
    return config.replace(instruction_encoder=name, instruction_dim=dim, max_instruction_tokens=longest)


def _resolve_sizes(config: EmmaConfig, family: ModelFamily, inner: nn.Module) -> EmmaConfig:
    visual_dim = family.visual_dim(inner)
    _require_agreement("visual_dim", config.visual_dim, visual_dim, f"this {type(inner).__name__}")
    fixed = family.has_fixed_size(inner)
    if fusion_class(config.fusion).fixed_num_visual_tokens and not fixed:
        raise UnsupportedModelError(
            f"fusion={config.fusion!r} has weights for a fixed number of visual tokens, and this model's vision tower "
            'gives each image its own; use fusion="attention" or "modulation"'
        )
    number, grid = family.visual_size(inner)
    if config.num_visual_tokens is None:
        return config.replace(visual_dim=visual_dim, num_visual_tokens=number, visual_grid=grid)
    if fixed and number is not None:
        _require_agreement("num_visual_tokens", config.num_visual_tokens, number, f"this {type(inner).__name__}")
    return config.replace(visual_dim=visual_dim)


def _require_agreement(name: str, given: int | None, actual: int, owner: str) -> None:
    if given is not None and given != actual:
        raise ConfigError(f"EmmaConfig.{name} is {given}, but {owner} has {actual}; leave it None to have it inferred")


def _special_ids(model: nn.Module, family: ModelFamily) -> set[int]:
    """Token ids that are never part of an instruction, as far as the model itself knows them."""
    inner = family.inner(model)
    ids: set[int] = {family.placeholder_id(inner, modality) for modality in family.pixel_arguments}
    config: Any = model.config
    for source in (config, config.get_text_config(), getattr(model, "generation_config", None)):
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(source, name, None)
            if value is not None:
                ids.update(value if isinstance(value, list) else [value])
    return ids


def _execution_device(module: nn.Module) -> torch.device:
    parameter = next(module.parameters())
    if parameter.device.type != "meta":
        return parameter.device
    # Offloaded by accelerate: its hook knows where the module runs.
    return torch.device(getattr(getattr(module, "_hf_hook", None), "execution_device", None) or "cpu")
