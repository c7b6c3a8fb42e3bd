"""From prompts with reference pictures to what the base has read of them: a :class:`~.layers.Prefix`."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, DataError, PatchError, UnsupportedModelError
from ..messages import plain, shown
from ..models.prompts import Prompts
from ..modules import private, sharding
from .fusion import fusing
from .layers import Prefix, text_model_of
from .state import UnifiedState

#: What a call of the model is given of a prompt, beside ids and pictures: nothing of these.
_NOT_OF_A_PROMPT = ("labels", "cache", "past_key_values", "position_ids", "use_cache", "logits_to_keep")


def encode_prompts(processor: Any, prompts: Sequence[str], images: Sequence[Sequence[Any]]) -> dict[str, Tensor]:
    """Return the model's inputs for prompts, padded on the left.

    Args:
        processor: the model's.
        prompts: texts of the user's turn; ``""`` is the empty prompt of guidance.
        images: the reference pictures of each, PIL images, which come first in the turn.

    Raises:
        DataError: if a prompt holds a token that stands for pictures, or the processor can't make inputs of them.
    """
    conversations = [
        [{"role": "user", "content": [*({"type": "image"} for _ in own), {"type": "text", "text": text}]}]
        for text, own in zip(prompts, images, strict=True)
    ]
    for text in prompts:
        check_placeholders(processor, text)
    maker = Prompts(processor)
    texts = [maker.prompt(talk) for talk in conversations]
    pictures = {"images": [list(own) for own in images]} if any(images) else {}
    try:
        made = processor(
            text=texts,
            **pictures,
            padding=True,
            padding_side="left",
            add_special_tokens=False,
            return_tensors="pt",
        )
    except Exception as error:
        raise DataError(
            f"the processor makes no inputs of the prompts and pictures ({type(error).__name__}: "
            f"{plain(str(error), 300)}): change what it names"
        ) from error
    return dict(made)


def check_placeholders(processor: Any, prompt: str) -> None:
    """Check that a prompt holds no token that stands for a picture.

    Raises:
        DataError: if it does.
    """
    for token in filter(None, (getattr(processor, name, None) for name in ("image_token", "video_token"))):
        if token in prompt:
            raise DataError(
                f"a prompt holds {token!r}, which stands for a picture in the model's input: leave it out; reference "
                "pictures are passed as image="
            )


def _require_here(text: nn.Module, branch: nn.Module) -> None:
    sharded = any(sharding.is_sharded(value) or sharding.is_partitioned(value) for value in text.parameters())
    if sharded or any(map(sharding.is_elsewhere, branch.parameters())):
        raise PatchError(
            "weights are sharded (FSDP, ZeRO-3, tensor parallel), or those of the branch that draws are offloaded, and "
            "are used outside of the calls that gather them: wrap the model in DistributedDataParallel or DeepSpeed "
            "ZeRO-1 or 2; call cpu_offload, disk_offload or dispatch_model before unify_model or load_unified"
        )


def read_prompts(model: nn.Module, state: UnifiedState, inputs: Mapping[str, Any]) -> Prefix:
    """Return what the base makes of prompts; its weights, hooks and stored positions are as before.

    Gradients reach what is trainable of the base, and the fusion at reference pictures, if the caller records any.

    Raises:
        PatchError: if the model was sharded, or the branch offloaded, since it can draw.
        UnsupportedModelError: if its cache doesn't hold keys and values of every token.
    """
    inner: Any = state.family.inner(model)
    text: Any = text_model_of(inner)
    _require_here(text, state.module)
    ids: Tensor = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    # Given, not left to the model: Qwen-VL would store what it counts, for the next call of whichever thread.
    positions = _positions(inner, inputs, mask)
    own = {name: value for name, value in inputs.items() if name not in _NOT_OF_A_PROMPT and _is_content(value)}
    given = {**own, "attention_mask": mask, "position_ids": positions, "use_cache": True, "return_dict": True}
    with _without_checkpointing(text), fusing(True):
        output = inner(**given)
    cache = private.cache_of(output)
    states = tuple((layer.keys, layer.values) for layer in getattr(cache, "layers", ()))
    if not states or any(keys is None or keys.shape[-2] != ids.shape[1] for keys, _ in states):
        raise UnsupportedModelError(
            f"{type(text).__name__} has a layer that keeps less than the {ids.shape[1]} tokens of the prompt, as a "
            "sliding window: shorten the prompt, or use fewer or smaller reference pictures"
        )
    if not bool(mask.all()):
        # What attention makes of padding may be NaN, which a weight of zero doesn't hide.
        real = mask.bool()[:, None, :, None]
        states = tuple((keys.where(real, 0), values.where(real, 0)) for keys, values in states)
    flat = positions if positions.ndim == 2 else positions.amax(0)
    start = flat.masked_fill(mask == 0, -1).amax(1) + 1
    return Prefix(states, mask.bool(), start)


def _is_content(value: Any) -> bool:
    """Whether an argument of a call is ids, pixels or sizes, rather than a setting."""
    return isinstance(value, (list, tuple)) or (isinstance(value, Tensor) and value.ndim > 0)


def has_planes(inner: Any) -> bool:
    """Return whether positions have three parts (time, row, column), as those of M-RoPE have."""
    return callable(getattr(inner, "get_rope_index", None))


def _positions(inner: Any, inputs: Mapping[str, Any], mask: Tensor) -> Tensor:
    """Positions of the prompt's tokens, those that the base would count without padding: ``[B, P]``, or ``[3, B, P]``
    of M-RoPE."""
    counted = (mask.long().cumsum(-1) - 1).clamp(min=0)
    if not has_planes(inner):
        return counted
    if inputs.get("image_grid_thw") is None and inputs.get("video_grid_thw") is None:
        return counted.expand(3, *counted.shape)
    known = inspect.signature(inner.get_rope_index).parameters
    given = {name: value for name, value in inputs.items() if name in known} | {"attention_mask": mask}
    if "mm_token_type_ids" in known and given.get("mm_token_type_ids") is None:
        given["mm_token_type_ids"] = (inputs["input_ids"] == inner.config.image_token_id).int()
    positions: Tensor = inner.get_rope_index(**given)[0]
    return positions


@contextmanager
def _without_checkpointing(text: nn.Module) -> Iterator[None]:
    """Have the base's decoder keep its cache, which it doesn't while it is checkpointed."""
    found: list[Any] = [module for module in text.modules() if getattr(module, "gradient_checkpointing", False) is True]
    for module in found:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in found:
            module.gradient_checkpointing = True


def check_length(inner: Any, prefix: Prefix, latents: int) -> None:
    """Check that a picture of so many latents fits behind the prompts.

    Raises:
        DataError: if both are longer than the model's context.
        UnsupportedModelError: if they are longer than the window of a layer.
    """
    config: Any = text_model_of(inner).config
    longest, total = getattr(config, "max_position_embeddings", None), prefix.length + latents
    if longest is not None and total > longest:
        raise DataError(
            f"a prompt of {prefix.length} tokens and a picture of {latents} latents are longer than the model's "
            f"context of {longest}: shorten the prompt, or make the picture or its references smaller"
        )
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    if window and slides and getattr(config, "use_sliding_window", True) and total > window:
        raise UnsupportedModelError(
            f"a prompt of {prefix.length} tokens and a picture of {latents} latents don't fit in the {window} tokens "
            "that the model's sliding-window layers see: shorten the prompt, or make pictures smaller"
        )


def on_device(inputs: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return inputs with their tensors on a device."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}


def check_prompts(prompts: Any) -> list[str]:
    """Return the prompts as a list.

    Raises:
        DataError: if one is empty, or no text.
    """
    texts = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(texts, Sequence) or not texts:
        raise DataError(f"prompts must be a text or a non-empty list of texts; got {shown(prompts)}")
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"a prompt must be a text that says what to draw; got {shown(text)}")
    return list(texts)


def check_processor(processor: Any) -> None:
    """Check that a processor makes the model's prompts.

    Raises:
        ConfigError: if it is None, or has no chat template.
    """
    if processor is None or not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
        raise ConfigError(
            "unify_model and load_unified need the model's processor, which makes its prompts: "
            "processor=AutoProcessor.from_pretrained(…)"
        )
    if not getattr(processor, "chat_template", None):
        raise ConfigError(
            f"the {type(processor).__name__} has no chat template, by which prompts with pictures are written: set "
            "processor.chat_template"
        )
