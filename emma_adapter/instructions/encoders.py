"""Instruction encoders: from texts to instruction tokens.

``"llm"``, the language model's own embeddings, is a lookup of token ids rather than an encoder of texts; it lives
in tokens.py.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..errors import EncoderError
from .cache import CacheInfo, LRUCache

OPEN_CLIP_PREFIX = "open_clip:"
CUSTOM_PREFIX = "custom:"


@runtime_checkable
class InstructionEncoder(Protocol):
    """What an instruction encoder must have; any ``nn.Module`` with these members can be given to ``patch_model``.

    It is frozen, called without gradients, and its answers are cached by text: the same text must always give
    the same tokens.
    """

    #: Dt, channels of an instruction token.
    instruction_dim: int
    #: The most instruction tokens a text can become.
    max_instruction_tokens: int

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """``(tokens [B, T, Dt], mask [B, T])``: ``mask`` is true or 1 at tokens that stem from the text.

        An encoder whose T is always ``max_instruction_tokens``, and whose other positions hold encodings too, may
        say so with an attribute ``encodes_padding = True``: the fusion ``linear`` then reads those as well. CLIP's
        text tower is such an encoder.
        """
        ...


class TransformersTextTower(nn.Module):
    """CLIP's text tower through transformers: a hub id or a local folder with weights and tokenizer.

    The tokens are ``hidden_states[layer]`` at all positions of the context. Unused positions are padded with
    token id 0, as the authors' tokenizer does (transformers' own pads CLIP with the end token).
    """

    encodes_padding = True

    def __init__(self, source: str, layer: int, *, revision: str | None = None, local_files_only: bool = False) -> None:
        super().__init__()
        from transformers import AutoTokenizer, CLIPTextModel

        options: dict[str, Any] = {"revision": revision, "local_files_only": local_files_only}
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(source, **options)
            self.tower = CLIPTextModel.from_pretrained(source, **options)
        except Exception as error:
            raise EncoderError(
                f"the CLIP text tower {source!r} can't be loaded ({type(error).__name__}: {error}). Give a hub id or "
                'a local folder that holds a CLIP checkpoint and its tokenizer, or use instruction_encoder="llm"'
            ) from error
        config = self.tower.config
        self.layer = _checked_layer(layer, config.num_hidden_layers, source)
        self.instruction_dim = config.hidden_size
        self.max_instruction_tokens = config.max_position_embeddings

    def forward(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        encoded = self.tokenizer(texts, truncation=True, max_length=self.max_instruction_tokens)["input_ids"]
        ids = torch.zeros(len(texts), self.max_instruction_tokens, dtype=torch.long)
        mask = torch.zeros(len(texts), self.max_instruction_tokens, dtype=torch.bool)
        for row, tokens in enumerate(encoded):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = True
        device = self.tower.device
        # No attention mask: the tower is causal, so that padding can't reach the text, and the authors give none.
        hidden_states = self.tower(input_ids=ids.to(device), output_hidden_states=True).hidden_states
        return hidden_states[self.layer], mask.to(device)


class OpenClipTextTower(nn.Module):
    """CLIP's text tower through open_clip, with its own tokenizer.

    ``source`` is ``MODEL:PRETRAINED`` (a tag or a local weights file), ``hf-hub:ORG/REPO`` or
    ``local-dir:FOLDER``. Layers are counted as in transformers: -1 is the output of the last block.
    """

    encodes_padding = True

    def __init__(self, source: str, layer: int) -> None:
        super().__init__()
        import open_clip

        name, pretrained = _split_open_clip_source(source)
        try:
            # The custom-text form holds the text tower as a module of its own, whatever the model. Weights are
            # required: open_clip's default is a tower of random ones.
            clip = open_clip.create_model(name, pretrained=pretrained, force_custom_text=True, require_pretrained=True)
            self.tokenizer = open_clip.get_tokenizer(name)
        except Exception as error:
            raise EncoderError(
                f"open_clip can't load {source!r} ({type(error).__name__}: {error}). See open_clip.list_pretrained(), "
                "or give MODEL:PATH with a local weights file"
            ) from error
        self.tower = clip.text
        if not isinstance(self.tower, open_clip.transformer.TextTransformer):
            raise EncoderError(
                f"open_clip's {source!r} has a {type(self.tower).__name__} as text tower; CLIP's is needed"
            )
        # hidden_states of transformers starts with the embeddings, open_clip counts blocks.
        self.block = _checked_layer(layer, len(self.tower.transformer.resblocks), source) - 1
        if self.block < 0:
            raise EncoderError(
                f"instruction_layer={layer} of {source!r} is its embedding layer; open_clip gives blocks only"
            )
        self.instruction_dim = int(self.tower.ln_final.weight.shape[0])
        self.max_instruction_tokens = int(self.tower.context_length)
        self.eos_id = getattr(self.tokenizer, "eot_token_id", None)

    def forward(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        device = self.tower.positional_embedding.device
        ids = self.tokenizer(texts, context_length=self.max_instruction_tokens).to(device)
        out = self.tower.forward_intermediates(ids, indices=[self.block], output_fmt="NLC", intermediates_only=True)
        return out["text_intermediates"][0], _through_first(ids, self.eos_id)


def _split_open_clip_source(source: str) -> tuple[str, str | None]:
    if source.startswith(("hf-hub:", "local-dir:")):
        return source, None
    name, _, pretrained = source.partition(":")
    return name, pretrained or None


def _checked_layer(layer: int, num_layers: int, source: str) -> int:
    """``layer`` as an index from the front into the ``num_layers + 1`` hidden states."""
    if not -(num_layers + 1) <= layer <= num_layers:
        raise EncoderError(
            f"instruction_layer={layer} doesn't exist in {source!r}, which has hidden states "
            f"{-(num_layers + 1)} to {num_layers}"
        )
    return layer % (num_layers + 1)


def _through_first(ids: Tensor, eos_id: int | None) -> Tensor:
    """True up to and with the first end token; everywhere if the tokenizer has none."""
    if eos_id is None:
        return torch.ones_like(ids, dtype=torch.bool)
    ends = (ids == eos_id).int()
    return ends.cumsum(dim=1) - ends == 0


class CachedEncoder:
    """A frozen encoder with a cache of what it said, on the device where its answers are wanted."""

    def __init__(self, encoder: nn.Module, cache_size: int) -> None:
        self.module = encoder.eval().requires_grad_(False)
        self.instruction_dim: int = encoder.instruction_dim  # type: ignore[assignment]
        self.max_instruction_tokens: int = encoder.max_instruction_tokens  # type: ignore[assignment]
        self.encodes_padding = bool(getattr(encoder, "encodes_padding", False))
        self._cache: LRUCache[tuple[Tensor, Tensor]] = LRUCache(cache_size)
        self._lock = threading.Lock()

    def encode(self, texts: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """``(tokens [B, T, Dt], mask bool [B, T])`` on ``device``."""
        encoded = self._cache.get_or_compute(list(texts), lambda missing: self._run(missing, device))
        tokens = pad_sequence([tokens for tokens, _ in encoded], batch_first=True)
        mask = pad_sequence([mask for _, mask in encoded], batch_first=True)
        return tokens.to(device), mask.to(device)

    def info(self) -> CacheInfo:
        return self._cache.info()

    def clear_cache(self) -> None:
        self._cache.clear()

    def _run(self, texts: list[Any], device: torch.device) -> list[tuple[Tensor, Tensor]]:
        # Neither the caller's inference mode nor its autocast may reach what is kept: inference tensors can't
        # be used in a later training step, and half-precision encodings would depend on who asked first.
        with (
            self._lock,
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(device.type, enabled=False),
        ):
            self.module.to(device)
            answer = self.module(list(texts))
        tokens, mask = self._checked(answer, len(texts))
        return [(t.clone(), m.clone()) for t, m in zip(tokens, mask, strict=True)]

    def _checked(self, answer: object, num_texts: int) -> tuple[Tensor, Tensor]:
        name = type(self.module).__name__
        if not (isinstance(answer, tuple) and len(answer) == 2 and all(isinstance(part, Tensor) for part in answer)):
            raise EncoderError(f"{name} must return (tokens, mask), two tensors; it returned {type(answer).__name__}")
        tokens, mask = answer
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
        return tokens.detach(), mask.bool()

    def __deepcopy__(self, memo: dict[int, object]) -> CachedEncoder:
        # Frozen, hence safe to share between copies of a model.
        return self

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key != "_lock"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())


def build_encoder(spec: str, layer: int) -> nn.Module:
    """The encoder that ``EmmaConfig.instruction_encoder`` names.

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


def check_protocol(encoder: object) -> nn.Module:
    """``encoder``, if it fulfils :class:`InstructionEncoder`.

    Raises:
        EncoderError: naming what is missing.
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
    """How a module of the user's is recorded in a config."""
    return f"{CUSTOM_PREFIX}{type(encoder).__module__}.{type(encoder).__qualname__}"
