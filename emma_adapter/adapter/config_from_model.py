"""Filling in a config from the model and the encoder that it is for."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..alignment.config import EmmaConfig
from ..alignment.fusion import fusion_class
from ..errors import ConfigError, UnsupportedModelError
from ..instructions.encoders import CachedEncoder, build_encoder, check_protocol, encoder_name
from ..instructions.pipeline import LLM, InstructionPipeline
from ..instructions.reader import InstructionReader
from ..messages import warn_caller
from ..models.families import ModelFamily
from ..models.projected_tokens import token_sizes

_LLM_MAX_INSTRUCTION_TOKENS = 128


def resolve_encoder(
    config: EmmaConfig, given: str | nn.Module | None, inner: nn.Module
) -> tuple[EmmaConfig, CachedEncoder | None]:
    """Return the config with the encoder's name and sizes, and the encoder: None for the language model's embeddings.

    Raises:
        ConfigError: if a size in ``config`` contradicts the encoder.
        EncoderError: if the encoder can't be loaded.
    """
    if given is None:
        given = config.instruction_encoder
    if given == LLM:
        return _with_encoder_sizes(config, LLM, embedding_dim(inner), None), None
    if isinstance(given, str):
        name, module = given, build_encoder(given, config.instruction_layer)
    else:
        module = check_protocol(given)
        name = encoder_name(module)
    encoder = CachedEncoder(module, config.cache_size)
    return _with_encoder_sizes(config, name, encoder.instruction_dim, encoder.max_instruction_tokens), encoder


def _with_encoder_sizes(config: EmmaConfig, name: str, dim: int, context: int | None) -> EmmaConfig:
    _require_agreement("instruction_dim", config.instruction_dim, dim, f"the instruction encoder {name!r}")
    length = config.max_instruction_tokens
    if length is None:
        length = context or _LLM_MAX_INSTRUCTION_TOKENS
    elif context is not None and length > context:
        raise ConfigError(
            f"EmmaConfig.max_instruction_tokens is {length}, but {name!r} reads at most {context} tokens: lower it, "
            "or leave it None"
        )
    return config.replace(instruction_encoder=name, instruction_dim=dim, max_instruction_tokens=length)


def resolve_sizes(config: EmmaConfig, family: ModelFamily, inner: nn.Module) -> EmmaConfig:
    """Return the config with the vision tower's sizes.

    Raises:
        ConfigError: if a size in ``config`` contradicts the model.
        UnsupportedModelError: if the fusion needs a fixed number of visual tokens and the tower has none.
    """
    if not isinstance(config, EmmaConfig):
        raise ConfigError(
            f"config must be an EmmaConfig; got a {type(config).__name__}: EmmaConfig(fusion=…), or "
            "EmmaConfig.from_dict(…) of a dict; a processor goes to processor=…"
        )
    visual_dim, number, grid = token_sizes(family, inner, projected=config.aligns_projected)
    _require_agreement("visual_dim", config.visual_dim, visual_dim, f"this {type(inner).__name__}")
    fixed = family.has_fixed_size(inner)
    if fusion_class(config.fusion).fixed_num_visual_tokens and not fixed:
        raise UnsupportedModelError(
            f"fusion={config.fusion!r} has weights for a fixed number of visual tokens, and this model's vision tower "
            'gives each image its own; use fusion="attention" or "modulation"'
        )
    if config.align_deepstack and not family.deepstack_projectors(inner):
        raise ConfigError(
            f"EmmaConfig.align_deepstack is True, but this {type(inner).__name__} has no deepstack projectors: leave "
            "it False"
        )
    if config.num_visual_tokens is None:
        return config.replace(visual_dim=visual_dim, num_visual_tokens=number, visual_grid=grid)
    if not fixed and config.visual_grid is None:
        raise ConfigError(
            f"EmmaConfig.num_visual_tokens is {config.num_visual_tokens}, but this {type(inner).__name__} gives each "
            "image its own number; name the grid that learned positions live on: EmmaConfig.visual_grid"
        )
    if fixed and number is not None:
        _require_agreement("num_visual_tokens", config.num_visual_tokens, number, f"this {type(inner).__name__}")
    return config.replace(visual_dim=visual_dim, visual_grid=grid if config.visual_grid is None else config.visual_grid)


def _require_agreement(name: str, value: int | None, actual: int, owner: str) -> None:
    if value is not None and value != actual:
        raise ConfigError(f"EmmaConfig.{name} is {value}, but {owner} has {actual}; leave it None to have it inferred")


def _special_ids(model: nn.Module) -> set[int]:
    """Return the token ids that are never part of an instruction, as far as the model's configs name them.

    They are those of padding, beginning and end, and of what frames images, such as ``vision_start_token_id``.
    """
    config: Any = model.config
    ids: set[int] = set()
    for source in (config, config.get_text_config(), getattr(model, "generation_config", None)):
        for name, value in source.to_dict().items() if source is not None else ():
            if name.endswith(("_token_id", "_token_index")) and value is not None:
                ids.update(value if isinstance(value, list) else [value])
    return ids


def make_reader(model: nn.Module, config: EmmaConfig, processor: Any) -> InstructionReader:
    """Return the reader of an adapter's prompts, and warn if it can't tell their turns apart.

    Raises:
        ConfigError: if ``processor`` is neither None nor holds a tokenizer.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    if processor is not None and (isinstance(tokenizer, type) or not callable(getattr(tokenizer, "decode", None))):
        raise ConfigError(
            "processor= must be the model's processor or tokenizer, as AutoProcessor.from_pretrained(…) returns it, or "
            f"None to take the whole prompt as the instruction; got {type(processor)}, which can't decode tokens"
        )
    reader = InstructionReader(processor, _special_ids(model), config.instruction_policy)
    if reader.markers is None and (reason := _why_unread(reader)):
        warn_caller(reason)
    return reader


def _why_unread(reader: InstructionReader) -> str | None:
    """Return why the policy has no effect on the processor's prompts, or None where the user asked for just that."""
    name = type(reader.processor).__name__
    if reader.processor is None:
        if reader.policy != "shortest_turn":
            return None
        return (
            'instruction_policy="shortest_turn" has no effect without a processor, by whose chat template turns are '
            "found: patch_model(model, …, processor=processor). Only where labels supervise answers, they part turns"
        )
    if reader.has_template:
        return (
            f"the chat template of this {name} doesn't show where a user's turn begins and ends: whole prompts will be "
            "the instruction, role words included, and instruction_policy has no effect. Repair the template, or name "
            "the instruction: model(**inputs, instruction=…)"
        )
    if reader.policy == "all_turns":
        return None
    return (
        f"this {name} has no chat template, by which a user's turns are found: whole prompts will be the instruction, "
        "and instruction_policy has no effect. Set processor.chat_template if prompts are conversations; "
        'EmmaConfig(instruction_policy="all_turns") says that they are single questions'
    )


def make_pipeline(config: EmmaConfig, reader: InstructionReader, encoder: CachedEncoder | None) -> InstructionPipeline:
    assert config.max_instruction_tokens is not None
    return InstructionPipeline(
        reader=reader,
        encoder=encoder,
        max_instruction_tokens=config.max_instruction_tokens,
        reads_padding=fusion_class(config.fusion).reads_padding,
    )


def embedding_dim(inner: nn.Module) -> int:
    embeddings: Any = inner.get_input_embeddings()  # type: ignore[operator]
    return int(embeddings.weight.shape[1])
