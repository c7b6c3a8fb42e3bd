"""Reading prompts and reference pictures with the base, into a :class:`~.layers.Prefix`."""

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

#: Arguments of a call that are not passed on when its prompt is read.
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
        [{"role": "user", "content": [*({"type": "image"} for _ in pictures), {"type": "text", "text": text}]}]
        for text, pictures in zip(prompts, images, strict=True)
    ]
    for text in prompts:
        check_placeholders(processor, text)
    template = Prompts(processor)
    texts = [template.prompt(conversation) for conversation in conversations]
    images_argument = {"images": [list(pictures) for pictures in images]} if any(images) else {}
    try:
        inputs = processor(
            text=texts,
            **images_argument,
            padding=True,
            padding_side="left",
            add_special_tokens=False,
            return_tensors="pt",
        )
    except Exception as error:
        raise DataError(
            f"the processor can't make inputs of the prompts and pictures ({type(error).__name__}: "
            f"{plain(str(error), 300)}): change what it names"
        ) from error
    return dict(inputs)


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
    """Read prompts with the base, leaving its weights, hooks and stored positions as they are.

    If the caller records gradients, they reach the base's trainable parameters, and the fusion at reference pictures.

    Raises:
        PatchError: if the model was sharded, or the branch offloaded, after it was made to draw.
        UnsupportedModelError: if its cache doesn't hold keys and values of every token.
    """
    inner: Any = state.family.inner(model)
    text: Any = text_model_of(inner)
    _require_here(text, state.module)
    ids: Tensor = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    # If Qwen-VL computed them, it would store its rope deltas, and any thread's next call would find them.
    positions = _positions(inner, inputs, mask)
    content = {name: value for name, value in inputs.items() if name not in _NOT_OF_A_PROMPT and _is_content(value)}
    call = {**content, "attention_mask": mask, "position_ids": positions, "use_cache": True, "return_dict": True}
    with _without_checkpointing(text), fusing(True):
        output = inner(**call)
    cache = private.cache_of(output)
    states = tuple((layer.keys, layer.values) for layer in getattr(cache, "layers", ()))
    if not states or any(keys is None or keys.shape[-2] != ids.shape[1] for keys, _ in states):
        raise UnsupportedModelError(
            f"{type(text).__name__} has a layer that keeps less than the {ids.shape[1]} tokens of the prompt, as with "
            "a sliding window: shorten the prompt, or use fewer or smaller reference pictures"
        )
    if not bool(mask.all()):
        # Attention may have made NaN of padding, and NaN times a weight of zero is NaN.
        real = mask.bool()[:, None, :, None]
        states = tuple((keys.where(real, 0), values.where(real, 0)) for keys, values in states)
    flat = positions if positions.ndim == 2 else positions.amax(0)
    start = flat.masked_fill(mask == 0, -1).amax(1) + 1
    return Prefix(states, mask.bool(), start)


def _is_content(value: Any) -> bool:
    """Return whether an argument of a call is ids, pixels or sizes, rather than a setting."""
    return isinstance(value, (list, tuple)) or (isinstance(value, Tensor) and value.ndim > 0)


def has_planes(inner: Any) -> bool:
    """Return whether positions have three parts (time, row, column), as with M-RoPE."""
    return callable(getattr(inner, "get_rope_index", None))


def _positions(inner: Any, inputs: Mapping[str, Any], mask: Tensor) -> Tensor:
    """Return the positions that tokens would have without padding: ``[B, P]``, or ``[3, B, P]`` of M-RoPE."""
    counted = (mask.long().cumsum(-1) - 1).clamp(min=0)
    if not has_planes(inner):
        return counted
    if inputs.get("image_grid_thw") is None and inputs.get("video_grid_thw") is None:
        return counted.expand(3, *counted.shape)
    parameters = inspect.signature(inner.get_rope_index).parameters
    arguments = {name: value for name, value in inputs.items() if name in parameters} | {"attention_mask": mask}
    if "mm_token_type_ids" in parameters and arguments.get("mm_token_type_ids") is None:
        arguments["mm_token_type_ids"] = (inputs["input_ids"] == inner.config.image_token_id).int()
    positions: Tensor = inner.get_rope_index(**arguments)[0]
    return positions


@contextmanager
def _without_checkpointing(text: nn.Module) -> Iterator[None]:
    """Switch checkpointing of the base's decoder off within the block: a checkpointed one keeps no cache."""
    checkpointed: list[Any] = [
        module for module in text.modules() if getattr(module, "gradient_checkpointing", False) is True
    ]
    for module in checkpointed:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in checkpointed:
            module.gradient_checkpointing = True


def check_length(inner: Any, prefix: Prefix, latents: int) -> None:
    """Check that a picture of so many latents fits behind the prompts.

    Raises:
        DataError: if they are longer than the model's context together.
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
    """Move the tensors among inputs to a device."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}


def check_prompts(prompts: Any) -> list[str]:
    """Return the prompts as a list.

    Raises:
        DataError: if there are none, or one is empty or not a text.
    """
    texts = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(texts, Sequence) or not texts:
        raise DataError(f"prompts must be a text or a non-empty list of texts; got {shown(prompts)}")
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"a prompt must be a text that says what to draw; got {shown(text)}")
    return list(texts)


def check_processor(processor: Any) -> None:
    """Check that a processor can format the model's prompts.

    Raises:
        ConfigError: if it is None, or lacks a tokenizer, an image processor or a chat template.
    """
    if processor is None or not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
        raise ConfigError(
            "unify_model and load_unified need the model's processor, which makes its prompts: "
            "processor=AutoProcessor.from_pretrained(…)"
        )
    if not getattr(processor, "chat_template", None):
        raise ConfigError(
            f"the {type(processor).__name__} has no chat template, which prompts with pictures are formatted by: set "
            "processor.chat_template"
        )
