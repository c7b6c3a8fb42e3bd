"""Instruction encoders: from texts to instruction tokens.

``"llm"``, the language model's own embeddings, is a lookup of token ids rather than an encoder of texts; it lives
in pipeline.py.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..errors import EncoderError
from ..files.hub import is_hub_id
from .cache import CacheInfo, LRUCache
from .text_towers import OpenClipTextTower, TransformersTextTower, is_open_clip_name

OPEN_CLIP_PREFIX = "open_clip:"
CUSTOM_PREFIX = "custom:"


@runtime_checkable
class InstructionEncoder(Protocol):
    """The interface of instruction encoders: any ``nn.Module`` with these members can be passed to ``patch_model``.

    It is frozen, called without gradients, and its results are cached by text: the same text must always give
    the same tokens.
    """

    #: Dt, channels of an instruction token.
    instruction_dim: int
    #: The most instruction tokens that one text can become.
    max_instruction_tokens: int

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Return ``(tokens [B, T, Dt], mask [B, T])``; ``mask`` is true or 1 at tokens that come from the text.

        An encoder whose T is always ``max_instruction_tokens``, and whose other positions hold encodings too, may
        declare this with ``encodes_padding = True``: the fusion ``linear`` then reads those as well. The text towers of
        CLIP and SigLIP are such encoders.
        """
        ...


class CachedEncoder:
    """A frozen encoder with a cache of its results, which runs on the device that a call asks for."""

    def __init__(self, encoder: nn.Module, cache_size: int) -> None:
        self.module = encoder.eval().requires_grad_(False)
        self.instruction_dim: int = encoder.instruction_dim  # type: ignore[assignment]
        self.max_instruction_tokens: int = encoder.max_instruction_tokens  # type: ignore[assignment]
        self.encodes_padding = bool(getattr(encoder, "encodes_padding", False))
        self._cache: LRUCache[tuple[Tensor, Tensor]] = LRUCache(cache_size)
        self._lock = threading.Lock()

    def encode(self, texts: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """Return ``(tokens [B, T, Dt], mask bool [B, T])`` on ``device``."""
        encoded = self._cache.get_or_compute(list(texts), lambda missing: self._run(missing, device))
        tokens = pad_sequence([tokens for tokens, _ in encoded], batch_first=True)
        mask = pad_sequence([mask for _, mask in encoded], batch_first=True)
        return tokens.to(device), mask.to(device)

    def info(self) -> CacheInfo:
        return self._cache.info()

    def clear_cache(self) -> None:
        self._cache.clear()

    def _run(self, texts: list[Any], device: torch.device) -> list[tuple[Tensor, Tensor]]:
        # Cached tensors must not depend on the caller's inference mode or autocast: inference tensors can't be
        # used in a later training step, and half-precision encodings would depend on which caller came first.
        with (
            self._lock,
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(device.type, enabled=False),
        ):
            self.module.to(device)
            output = self.module(list(texts))
        tokens, mask = self._checked(output, len(texts))
        return [(t.clone(), m.clone()) for t, m in zip(tokens, mask, strict=True)]

    def _checked(self, output: object, num_texts: int) -> tuple[Tensor, Tensor]:
        name = type(self.module).__name__
        if not (isinstance(output, tuple) and len(output) == 2 and all(isinstance(part, Tensor) for part in output)):
            raise EncoderError(f"{name} must return (tokens, mask), two tensors; it returned {type(output).__name__}")
        tokens, mask = output
        if tokens.ndim != 3 or tokens.shape[0] != num_texts or tokens.shape[2] != self.instruction_dim:
            raise EncoderError(
                f"{name} must return tokens [{num_texts}, T, {self.instruction_dim}] for {num_texts} text(s); "
                f"it returned {list(tokens.shape)}"
            )
        if mask.shape != tokens.shape[:2]:
            raise EncoderError(f"{name} must return a mask {list(tokens.shape[:2])}; it returned {list(mask.shape)}")
        if tokens.shape[1] > self.max_instruction_tokens:
            raise EncoderError(
                f"{name} returned {tokens.shape[1]} tokens a text and declares at most {self.max_instruction_tokens}"
            )
        mask = mask.bool()
        if not bool(torch.isfinite(tokens[mask] if not self.encodes_padding else tokens).all()):
            raise EncoderError(
                f"{name} gives NaN or infinite values in {tokens.dtype}: load it in float32 or bfloat16, or check its "
                "weights"
            )
        return tokens.detach(), mask

    def __deepcopy__(self, memo: dict[int, object]) -> CachedEncoder:
        # Frozen, hence safe to share between copies of a model.
        return self

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key != "_lock"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())


def build_encoder(spec: str, layer: int) -> nn.Module:
    """Build the encoder that ``EmmaConfig.instruction_encoder`` names.

    Raises:
        EncoderError: if it can't be loaded, or names a module that only the user has.
    """
    if spec.startswith(CUSTOM_PREFIX):
        raise EncoderError(
            f"this adapter was made with your own instruction encoder {spec.removeprefix(CUSTOM_PREFIX)!r}; "
            "pass it again: instruction_encoder=<the module>"
        )
    if spec.startswith(OPEN_CLIP_PREFIX):
        return OpenClipTextTower(spec.removeprefix(OPEN_CLIP_PREFIX), layer)
    return TransformersTextTower(spec, layer)


def names_a_path(spec: str) -> bool:
    """Return whether :func:`build_encoder` would read ``spec`` from a local file or folder, not download it."""
    if spec.startswith(CUSTOM_PREFIX):
        return False
    if spec.startswith(OPEN_CLIP_PREFIX):
        return not is_open_clip_name(spec.removeprefix(OPEN_CLIP_PREFIX))
    return not is_hub_id(spec)


def check_protocol(encoder: object) -> nn.Module:
    """Return ``encoder`` if it satisfies :class:`InstructionEncoder`.

    Raises:
        EncoderError: if it doesn't; the message names what is missing.
    """
    if not isinstance(encoder, nn.Module):
        raise EncoderError(
            'instruction_encoder must be "llm", a hub id, a local folder, "open_clip:MODEL:PRETRAINED" or an '
            f"nn.Module that follows emma_adapter.InstructionEncoder; got {type(encoder).__name__}"
        )
    for name in ("instruction_dim", "max_instruction_tokens"):
        value = getattr(encoder, name, None)
        if not isinstance(value, int) or value < 1:
            raise EncoderError(
                f"the instruction encoder {type(encoder).__name__} must have an integer attribute {name!r} >= 1; "
                f"it is {value!r}"
            )
    return encoder


def encoder_name(encoder: nn.Module) -> str:
    """Return the name by which a config records a user's own encoder."""
    return f"{CUSTOM_PREFIX}{type(encoder).__module__}.{type(encoder).__qualname__}"
