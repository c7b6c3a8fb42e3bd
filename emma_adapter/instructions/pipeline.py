"""The instruction of a call as tokens for the adapter: explicit or read from the prompt, looked up or encoded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import InstructionError
from .encoders import CachedEncoder
from .prompt import Prompt
from .reader import InstructionReader

LLM = "llm"
_TEACHES_NOTHING = (
    "a training call has a row with an image and an empty instruction: the adapter leaves visual tokens as they are "
    "where nothing is asked, and learns nothing from that row. Leave it out of the data, or write the question"
)
#: What ``instruction=`` accepts: one text for all rows, a text per row, token ids ``[B, T]``, or a tokenizer's output.
Instruction = str | Sequence[str] | Tensor | Mapping[str, Tensor]


@dataclass(frozen=True)
class InstructionTokens:
    """Encoded instructions of a batch: ``tokens [B, T, Dt]``, ``mask [B, T]`` or None if all positions count."""

    tokens: Tensor
    mask: Tensor | None

    def of_rows(self, rows: Tensor) -> InstructionTokens:
        rows = rows.to(self.tokens.device)
        return InstructionTokens(self.tokens[rows], None if self.mask is None else self.mask[rows])

    def for_each(self, number: int, what: str) -> InstructionTokens:
        """Return ``number`` rows: these, or the only one repeated.

        Raises:
            InstructionError: if there are several, but not ``number``.
        """
        if len(self) not in (1, number):
            raise InstructionError(
                f"adapter.instruction() was given {len(self)} instructions for {number} {what}: give one for all, or "
                "one for each"
            )
        if len(self) == number:
            return self
        return self.of_rows(torch.zeros(number, dtype=torch.long))

    def equals(self, other: InstructionTokens) -> bool:
        if self is other:
            return True
        if self.mask is None or other.mask is None:
            same_mask = self.mask is other.mask
        else:
            same_mask = torch.equal(self.mask, other.mask)
        return same_mask and self.tokens.device == other.tokens.device and torch.equal(self.tokens, other.tokens)

    def __len__(self) -> int:
        return self.tokens.shape[0]


@dataclass(frozen=True)
class InstructionPipeline:
    """Turns the instruction of a call into :class:`InstructionTokens`."""

    reader: InstructionReader
    encoder: CachedEncoder | None  # None: the language model's embeddings
    max_instruction_tokens: int
    reads_padding: bool

    def explicit(
        self,
        instruction: Instruction,
        mask: Tensor | None,
        num_rows: int | None,
        embed: Callable[[Tensor], Tensor],
        device: torch.device,
        trained: Tensor | None = None,
    ) -> InstructionTokens:
        """Return the tokens of an ``instruction=`` argument.

        Args:
            instruction: as passed to the call.
            mask: ``[B, T]``, true or 1 at token ids that count.
            num_rows: the call's number of rows; None outside a call.
            embed: the language model's embeddings.
            device: of the returned tokens.
            trained: bool ``[B]``, rows with images in a training call; an empty instruction there brings a warning.

        Raises:
            InstructionError: if its number of rows differs from the call's, or its type is not allowed.
        """
        if isinstance(instruction, str):
            instruction = [instruction] * (1 if num_rows is None else num_rows)
        if isinstance(instruction, Mapping) and "input_ids" in instruction:
            mask = instruction.get("attention_mask") if mask is None else mask
            instruction = instruction["input_ids"]
        texts: list[str] | None = None
        ids: Tensor | None = None
        if isinstance(instruction, Tensor):
            ids, mask = _checked_ids(instruction, mask)
        elif isinstance(instruction, Sequence) and all(isinstance(text, str) for text in instruction):
            texts = list(instruction)
        else:
            raise InstructionError(
                "instruction= must be a text, a list with one text per row, token ids [B, T] (with "
                f"instruction_mask= if they are padded), or a tokenizer's output; got {type(instruction).__name__}"
            )
        if texts is not None and mask is not None:
            raise InstructionError(
                "instruction_mask= says which token ids of instruction= are padding, and instruction= is text: leave "
                "the mask out, or give the ids"
            )
        if texts is not None and not texts:
            raise InstructionError("instruction= is an empty list; give one text per row, or one text for all")
        given_rows = len(texts) if texts is not None else ids.shape[0]  # type: ignore[union-attr]
        if num_rows is not None and given_rows != num_rows:
            raise InstructionError(
                f"instruction= has {given_rows} row(s) and the call has {num_rows}; give one per row"
            )
        self._check_taught(texts, mask, trained)
        if self.encoder is not None:
            if texts is None:
                assert ids is not None and mask is not None
                texts = self.reader.decode([row[keep] for row, keep in zip(ids.cpu(), mask.cpu(), strict=True)])
            return self._encode(texts, device)
        if ids is None or mask is None:
            assert texts is not None
            ids, mask = self.reader.tokenize(texts)
        else:
            _check_vocabulary(ids.masked_fill(~mask, 0), embed)
        return self._embed(ids.to(device), mask.to(device), embed)

    def inferred(self, prompt: Prompt, embed: Callable[[Tensor], Tensor]) -> InstructionTokens:
        """Return the tokens of the instruction that the prompt holds.

        Raises:
            InstructionError: if it can't be told apart from the answer, or can't be decoded for a text tower.
        """
        trained = None
        if prompt.trains:
            trained = torch.ones(len(prompt.input_ids)) if prompt.has_media is None else prompt.has_media
        if self.encoder is not None:
            texts = self.reader.texts(prompt)
            self._check_taught(texts, None, trained)
            return self._encode(texts, prompt.input_ids.device)
        selected = self.reader.select(prompt)
        self._check_taught(None, selected, trained)
        selected = selected.to(prompt.input_ids.device)
        return self._embed(*_left_aligned(prompt.input_ids, selected), embed)

    def _check_taught(self, texts: list[str] | None, mask: Tensor | None, trained: Tensor | None) -> None:
        if trained is None:
            return
        if texts is not None:
            empty = [not text.strip() for text in texts]
        else:
            assert mask is not None
            empty = (~mask).all(dim=1).tolist()
        if any(is_empty and is_trained for is_empty, is_trained in zip(empty, trained.tolist(), strict=True)):
            self.reader.warn_once(_TEACHES_NOTHING)

    def _encode(self, texts: list[str], device: torch.device) -> InstructionTokens:
        assert self.encoder is not None
        tokens, mask = self.encoder.encode(texts, device)
        tokens, mask = tokens[:, : self.max_instruction_tokens], mask[:, : self.max_instruction_tokens]
        if self.reads_padding and self.encoder.encodes_padding:
            return InstructionTokens(tokens, None)
        # Nothing reads masked positions, so those after the longest text of the batch can go.
        longest = max(1, int(mask.sum(dim=1).max()))
        if bool((mask.cumsum(dim=1) == torch.arange(1, mask.shape[1] + 1, device=device))[mask].all()):
            tokens, mask = tokens[:, :longest], mask[:, :longest]
        return InstructionTokens(tokens, mask)

    def _embed(self, ids: Tensor, mask: Tensor, embed: Callable[[Tensor], Tensor]) -> InstructionTokens:
        # Keep the end: where the whole prompt is taken for the instruction, the question stands there.
        ids, mask = _cut_to_last(ids, mask, self.max_instruction_tokens)
        # A masked id may be a placeholder's, which need not be in the vocabulary.
        return InstructionTokens(embedded(embed, ids.masked_fill(~mask, 0)), mask)


def embedder(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return the language model's input embeddings, as a module so that offloading and sharding hooks run."""
    return model.get_input_embeddings()  # type: ignore[operator]


def embedded(embed: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
    """Return the embeddings of ids ``[B, T]`` as in eval mode, without gradients: ``[B, T, D]``.

    Noise that training adds to a prompt's embeddings, such as NEFTune's or dropout, is kept out of the instruction:
    the adapter meets none when it is used. The current weights are used, PEFT's changes included.
    """
    training_modules = [module for module in embed.modules() if module.training] if isinstance(embed, nn.Module) else []
    for module in training_modules:
        module.training = False
    try:
        with torch.no_grad():
            return embed(ids).detach()
    finally:
        for module in training_modules:
            module.training = True


def _checked_ids(ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    if ids.ndim != 2 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise InstructionError(f"token ids of instruction= must be integers [B, T]; got {ids.dtype} {list(ids.shape)}")
    if mask is None:
        return ids, torch.ones_like(ids, dtype=torch.bool)
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        actual = list(mask.shape) if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise InstructionError(
            f"instruction_mask= must be a tensor {list(ids.shape)} as the token ids, 1 where they count; got {actual}"
        )
    return ids, mask.bool()


def _check_vocabulary(ids: Tensor, embed: Callable[[Tensor], Tensor]) -> None:
    vocabulary = getattr(getattr(embed, "weight", None), "shape", (None,))[0]
    if vocabulary and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise InstructionError(
            f"instruction= holds token ids from {int(ids.min())} to {int(ids.max())}, and the language model's "
            f"vocabulary ends at {vocabulary}: tokenize with the model's own tokenizer"
        )


def _left_aligned(ids: Tensor, selected: Tensor) -> tuple[Tensor, Tensor]:
    """Move each row's selected ids to its front; return them ``[B, T]``, T the most in a row, and their mask."""
    longest = max(1, int(selected.sum(dim=1).max()))
    order = torch.argsort(selected.int(), dim=1, descending=True, stable=True)[:, :longest]
    return ids.gather(1, order), selected.gather(1, order)


def _cut_to_last(ids: Tensor, mask: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Keep at most the last ``length`` valid ids of each row, moved to the front."""
    if ids.shape[1] <= length:
        return ids, mask
    remaining = mask.int().flip(1).cumsum(1).flip(1)
    return _left_aligned(ids, mask & (remaining <= length))
