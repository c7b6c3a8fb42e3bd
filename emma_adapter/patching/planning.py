"""Plans of calls, from their arguments: the instruction of each row, and how many placeholders the row holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InstructionError, RoutingError
from ..instructions.packed_samples import Samples, find_samples
from ..instructions.pipeline import InstructionTokens, embedded, embedder
from ..instructions.prompt import Prompt
from ..models.families import ModelFamily
from ..models.feature_calls import FeatureCall
from ..models.placeholders import find_placeholders, placeholder_ids
from ..modules.private import is_cache
from .call_plan import CallPlan, OuterCall, PinnedPrompt
from .setup_checks import check_in_place
from .state import AdapterState


def has_pixels(family: ModelFamily, arguments: Mapping[str, Any]) -> bool:
    return any(arguments.get(family.pixel_arguments[modality]) is not None for modality in family.modalities)


def plan_call(
    state: AdapterState, inner: nn.Module, outer: OuterCall, arguments: Mapping[str, Any], *, cached: int = 0
) -> CallPlan:
    """Return the plan of a call with pixels.

    Args:
        state: state of the patched model.
        inner: the module whose ``forward`` takes pixels and token ids.
        outer: arguments that only the outer model was given.
        arguments: the other arguments, by name.
        cached: how many of the ids came with earlier calls: this call's images are not among them.

    Raises:
        InstructionError: if the instruction can't be determined.
        RoutingError: if the placeholders can't be found.
        PatchError: if another tool has wrapped the projector so that it bypasses the adapter.
    """
    check_in_place(state, inner)
    is_placeholder = _is_placeholder(state.family, inner, arguments)
    explicit = outer.instruction is not None or state.named_instruction is not None
    samples = find_samples(arguments, next(iter(is_placeholder.values())).shape, required=not explicit)
    if samples is not None:
        is_placeholder = {modality: samples.unpack(where, False) for modality, where in is_placeholder.items()}
    placeholders = {modality: where[:, cached:].sum(dim=1) for modality, where in is_placeholder.items()}
    has_media = torch.stack(list(placeholders.values())).sum(dim=0) > 0
    instruction = _instruction_tokens(state, inner, outer, has_media, arguments, samples)
    return CallPlan(inner, state.active, instruction, placeholders, _own_feature_call(state.family, arguments))


def cached_length(arguments: Mapping[str, Any]) -> int:
    """Return how many of the ids (or embeddings) of a ``generate`` came with earlier calls and are in a cache.

    None of them, 0, if it is given only new ones, which a longer attention mask shows. A cache is known by its
    ``get_seq_length``, since the argument's name differs between releases of transformers.

    Raises:
        RoutingError: if there are several caches, and they hold different numbers of tokens.
    """
    caches = {name: value for name, value in arguments.items() if is_cache(value)}
    lengths = {int(cache.get_seq_length()) for cache in caches.values()}
    if len(lengths) > 1:
        raise RoutingError(f"{sorted(caches)} are caches of different lengths, {sorted(lengths)}: pass one of them")
    ids, mask = arguments.get("input_ids"), arguments.get("attention_mask")
    embeds = arguments.get("inputs_embeds")
    if embeds is None and isinstance(ids, Tensor) and isinstance(mask, Tensor) and mask.shape[-1] != ids.shape[-1]:
        return 0
    return max(lengths, default=0)


def pinned_plan(state: AdapterState, inner: nn.Module, pinned: PinnedPrompt, arguments: Mapping[str, Any]) -> CallPlan:
    """Return the plan of a forward inside ``generate``, whose prompt gave the instruction."""
    placeholders = {
        modality: where.sum(dim=1) for modality, where in _is_placeholder(state.family, inner, arguments).items()
    }
    plan = pinned.plan
    # transformers < 5.18 repeats prompts and pixels for beams before it encodes the images.
    repeats = next(iter(placeholders.values())).shape[0] // len(plan.instruction)
    feature_call = _own_feature_call(state.family, arguments)
    return CallPlan(inner, plan.adapter, plan.instruction, placeholders, feature_call, repeats)


def _own_feature_call(family: ModelFamily, arguments: Mapping[str, Any]) -> FeatureCall:
    """Return the images as the call itself describes them."""
    modality = family.modalities[0]
    return FeatureCall.of(family, modality, arguments.get(family.pixel_arguments[modality]), arguments)


def _is_placeholder(family: ModelFamily, inner: nn.Module, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return where placeholder tokens are: bool ``[B, L]`` for each modality."""
    ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
    if isinstance(ids, Tensor) and (ids.ndim != 2 or ids.is_floating_point() or ids.is_complex()):
        raise RoutingError(f"input_ids must be integers [B, L]; got {ids.dtype} {list(ids.shape)}")
    if isinstance(embeds, Tensor) and embeds.ndim != 3:
        raise RoutingError(f"inputs_embeds must be [B, L, D]; got {list(embeds.shape)}")
    if isinstance(ids, Tensor):
        return find_placeholders(family, inner, ids)
    if ids is None and isinstance(embeds, Tensor):
        token_ids = placeholder_ids(family, inner)
        return {modality: _equals_embedding(inner, token_id, embeds) for modality, token_id in token_ids.items()}
    prompt = ids if embeds is None else embeds
    raise RoutingError(
        "a call with images needs input_ids or inputs_embeds, a tensor as the model's processor returns with "
        f'return_tensors="pt"; got {type(prompt).__name__}'
    )


def _equals_embedding(inner: nn.Module, token_id: int, embeds: Tensor) -> Tensor:
    """Return where the embedding equals the placeholder's, as transformers does: bool ``[B, L]``."""
    embed = embedder(inner)
    vocabulary = embed.weight.shape[0]  # type: ignore[attr-defined]
    if not 0 <= token_id < vocabulary:
        raise RoutingError(
            f"the placeholder token {token_id} has no embedding (the vocabulary ends at {vocabulary}), so that images "
            "can't be found in inputs_embeds; pass input_ids"
        )
    placeholder = embedded(embed, torch.tensor([[token_id]], device=embeds.device)).to(embeds.dtype)
    return (embeds == placeholder).all(dim=-1)


def _has_decoder(inner: nn.Module) -> bool:
    """Return whether answers have token ids of their own, as in encoder-decoder models."""
    config: Any = inner.config
    return any(getattr(part, "is_encoder_decoder", False) for part in (config, config.get_text_config(encoder=True)))


def _instruction_tokens(
    state: AdapterState,
    inner: nn.Module,
    outer: OuterCall,
    has_media: Tensor,
    arguments: Mapping[str, Any],
    samples: Samples | None,
) -> InstructionTokens:
    """Return the call's instruction, explicit or inferred: one row per row (or packed sample) of the call."""
    embed = embedder(inner)
    rows, device = len(has_media), has_media.device
    if outer.instruction_mask is not None and outer.instruction is None:
        raise InstructionError(
            "instruction_mask= says which token ids of instruction= are padding, and there is no instruction=: give "
            "both, or neither"
        )
    trains = inner.training and outer.records_gradients
    if outer.instruction is not None:
        trained_rows = has_media if trains else None
        return state.pipeline.explicit(outer.instruction, outer.instruction_mask, rows, embed, device, trained_rows)
    if (named := state.named_instruction) is not None:
        return named.for_each(rows, "rows")
    ids, mask = arguments.get("input_ids"), arguments.get("attention_mask")
    if ids is None:
        raise InstructionError(
            "the instruction can't be read from inputs_embeds; pass it: "
            'model(**inputs, instruction=["…", …]), or the same with generate'
        )
    labels, assistant_mask = outer.labels, outer.assistant_mask
    if _has_decoder(inner):
        # Labels are the decoder's, and what the encoder reads holds no answer, even in training.
        labels, trains = None, False
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        mask = None
    if samples is not None:
        # A tensor of another shape than the ids stays as it is: the reader says what is wrong with it.
        mask = samples.valid(mask)
        labels = labels if labels is None or labels.shape != ids.shape else samples.unpack(labels, -100)
        if assistant_mask is not None and assistant_mask.shape == ids.shape:
            assistant_mask = samples.unpack(assistant_mask, 0)
        ids = samples.unpack(ids, 0)
    prompt = Prompt(
        input_ids=ids,
        attention_mask=mask,
        labels=labels,
        assistant_mask=assistant_mask,
        trains=trains,
        has_media=has_media,
        placeholder_ids=frozenset(placeholder_ids(state.family, inner).values()),
    )
    return state.pipeline.inferred(prompt, embed)
