"""One model family as tests use it: a model, its processor, and batches made with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from .rows import Row

IGNORED = -100


def encode_chat(
    processor: ProcessorMixin,
    rows: Sequence[Row],
    answer: str | None,
    *,
    generate: bool,
    padding_side: str,
    nested_images: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Conversations through the chat template, then text and media through the processor, all rows at once.

    ``options`` are arguments of the processor.
    """
    texts = [processor.apply_chat_template(row.messages(answer), add_generation_prompt=generate) for row in rows]
    media: dict[str, Any] = {}
    if any(row.images for row in rows):
        pictures = [row.pictures() for row in rows]
        media["images"] = pictures if nested_images else [picture for row in pictures for picture in row]
    if any(row.videos for row in rows):
        media["videos"] = [clip for row in rows for clip in row.clips()]
        media["video_metadata"] = [metadata for row in rows for metadata in row.clip_metadata()]
    bos = processor.tokenizer.bos_token
    made = processor(
        text=texts,
        **media,
        padding=True,
        padding_side=padding_side,
        add_special_tokens=not (bos and texts[0].startswith(bos)),
        return_tensors="pt",
        **options,
    )
    return dict(made)


def encode_nested_chat(*arguments: Any, **settings: Any) -> dict[str, Any]:
    """:func:`encode_chat` for processors that need to know which row a picture belongs to."""
    return encode_chat(*arguments, **settings, nested_images=True)


@dataclass(frozen=True)
class Entry:
    name: str
    """``config.model_type``, or with a suffix where two towers share one."""
    make_processor: Callable[[], ProcessorMixin] = field(repr=False)
    make_model: Callable[[ProcessorMixin], PreTrainedModel] = field(repr=False)
    videos: bool = False
    """Takes ``pixel_values_videos``."""
    mixes_media: bool = True
    """Takes pictures and videos in one call."""
    videos_in_row: int = 2
    """The most that a row can have."""
    stacks_videos: bool = True
    """Videos of a batch are one tensor, and must have the same number of frames."""
    dynamic: bool = False
    """The number of visual tokens depends on the picture's size."""
    reads_ids: bool = False
    """Token ids say more than their embeddings do: positions, or an embedding of each layer."""
    encode: Callable[..., dict[str, Any]] = field(default=encode_chat, repr=False)

    def model(self, seed: int = 0) -> PreTrainedModel:
        """In eval mode, its weights given by ``seed``; ``generate`` never ends before ``max_new_tokens``."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = self.make_model(_processor_of(self)).eval()
        made.generation_config.eos_token_id = None
        made.generation_config.pad_token_id = _processor_of(self).tokenizer.pad_token_id
        return made

    def processor(self) -> ProcessorMixin:
        """A new one, which the caller may change."""
        return self.make_processor()

    def batch(self, rows: Sequence[Row], *, generate: bool = True, padding_side: str = "left") -> dict[str, Any]:
        """What the processor makes of ``rows``, as ``forward`` and ``generate`` take it."""
        return self._encode(rows, None, generate=generate, padding_side=padding_side)

    def _encode(self, rows: Sequence[Row], answer: str | None, *, generate: bool, padding_side: str) -> dict[str, Any]:
        if not self.videos and any(row.videos for row in rows):
            raise ValueError(f"{self.name} takes no pixel_values_videos")
        return self.encode(_processor_of(self), rows, answer, generate=generate, padding_side=padding_side)


@cache
def _processor_of(entry: Entry) -> ProcessorMixin:
    """The one that makes batches; it is not handed out, so that no test can change it for another."""
    return entry.make_processor()


def answered(entry: Entry, rows: Sequence[Row], answer: str, *, padding_side: str = "right") -> dict[str, Any]:
    """A training batch: conversations that end in ``answer``, and ``labels`` for all that follows the prompt."""
    prompts = entry._encode(rows, None, generate=True, padding_side=padding_side)
    made = entry._encode(rows, answer, generate=False, padding_side=padding_side)
    labels = torch.full_like(made["input_ids"], IGNORED)
    for row, (ids, real) in enumerate(zip(made["input_ids"], made["attention_mask"].bool(), strict=True)):
        prompt = _real_ids(prompts, row)
        positions = real.nonzero().squeeze(-1)
        own = ids[positions][: len(prompt)]
        # LLaVA-OneVision's generation prompt lacks the space that its template writes before answers.
        shared = int((own == prompt[: len(own)]).cumprod(0).sum())
        if len(own) < len(prompt) or shared < len(prompt) - 2:
            raise AssertionError(f"{entry.name}: row {row}'s prompt is not what its answered conversation begins with")
        labels[row, positions[shared:]] = ids[positions[shared:]]
    return {**made, "labels": labels}


def _real_ids(batch: dict[str, Any], row: int) -> Tensor:
    return batch["input_ids"][row][batch["attention_mask"][row].bool()]
