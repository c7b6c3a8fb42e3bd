"""Gemma: SigLIP towers, and attention in both directions within a picture (Gemma 3) or the whole prompt (PaliGemma)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers as hf
from transformers import PreTrainedModel, ProcessorMixin

from tests.support import tiny
from tests.support.tiny import IMAGE_SIZE, PATCH, WIDTH

from .entry import Entry, encode_nested_chat
from .rows import Row
from .settings import square, text_settings, vision_settings
from .text import chat_template, tokenizer


def gemma3_processor() -> hf.Gemma3Processor:
    return hf.Gemma3Processor(
        image_processor=hf.Gemma3ImageProcessor(size=square(4 * PATCH)),
        tokenizer=tokenizer(
            bos="<bos>",
            eos="<eos>",
            pad="<pad>",
            prepend_bos=True,
            names={
                "boi_token": "<start_of_image>",
                "eoi_token": "<end_of_image>",
                "image_token": "<image_soft_token>",
            },
            others=("<start_of_turn>", "<end_of_turn>"),
        ),
        image_seq_length=tiny.TOKENS_PER_IMAGE,
        chat_template=chat_template(
            start="<bos>",
            user="<start_of_turn>user\n{}<end_of_turn>\n",
            assistant="<start_of_turn>model\n{}<end_of_turn>\n",
            system="<start_of_turn>user\n{}\n\n",
            system_in_first_user=True,
            image="<start_of_image>",
            text="part.text | trim",
        ),
    )


def gemma3_model(processor: ProcessorMixin) -> PreTrainedModel:
    words = processor.tokenizer
    text = text_settings(words, head_dim=8, query_pre_attn_scalar=8, sliding_window=1024)
    made = hf.Gemma3ForConditionalGeneration(
        hf.Gemma3Config(
            vision_config=hf.SiglipVisionConfig(**vision_settings(4 * PATCH, vision_use_head=False)),
            text_config=hf.Gemma3TextConfig(**text),
            mm_tokens_per_image=tiny.TOKENS_PER_IMAGE,
            image_token_index=words.image_token_id,
            boi_token_index=words.boi_token_id,
            eoi_token_index=words.eoi_token_id,
        )
    )
    # Transformers starts it at zero, which would hide every picture.
    made.model.multi_modal_projector.mm_input_projection_weight.data.normal_(std=WIDTH**-0.5)
    return made


def paligemma_processor() -> hf.PaliGemmaProcessor:
    images = hf.SiglipImageProcessor(size=square(IMAGE_SIZE))
    images.image_seq_length = tiny.TOKENS_PER_IMAGE
    return hf.PaliGemmaProcessor(
        image_processor=images,
        tokenizer=tokenizer(bos="<bos>", eos="<eos>", pad="<pad>", names={"image_token": "<image>"}),
    )


def paligemma_model(processor: ProcessorMixin) -> PreTrainedModel:
    vision = vision_settings(IMAGE_SIZE, projection_dim=WIDTH, vision_use_head=False)
    text = text_settings(processor.tokenizer, head_dim=8, num_image_tokens=tiny.TOKENS_PER_IMAGE)
    return hf.PaliGemmaForConditionalGeneration(
        hf.PaliGemmaConfig(
            vision_config=hf.SiglipVisionConfig(**vision),
            text_config=hf.GemmaConfig(**text),
            image_token_index=processor.image_token_id,
            projection_dim=WIDTH,
            hidden_size=WIDTH,
        )
    )


def encode_prefix(
    processor: hf.PaliGemmaProcessor, rows: Sequence[Row], answer: str | None, *, generate: bool, padding_side: str
) -> dict[str, Any]:
    """PaliGemma has no chat template: all pictures, then all text.

    Row by row, because its processor takes no text without a picture, and in a batch with pictures puts ``<bos>`` six
    characters into such a text.
    """
    words = processor.tokenizer
    encoded: list[dict[str, Any]] = []
    pixels: list[torch.Tensor] = []
    for row in rows:
        text = "\n".join(message["content"][-1]["text"] for message in row.messages())
        if row.images:
            placeholders = processor.image_token * len(row.images)
            made = processor(text=[placeholders + text], images=row.pictures(), suffix=answer)
            pixels.extend(made["pixel_values"])
        else:
            made = words(
                [f"{words.bos_token}{text}\n"],
                text_pair=None if answer is None else [answer + words.eos_token],
                return_token_type_ids=True,
            )
        encoded.append({name: made[name][0] for name in ("input_ids", "attention_mask", "token_type_ids")})
    batch = dict(words.pad(encoded, padding_side=padding_side, return_tensors="pt"))
    return {**batch, "pixel_values": torch.stack(pixels)} if pixels else batch


ENTRIES = (
    Entry("gemma3", gemma3_processor, gemma3_model, encode=encode_nested_chat),
    Entry("paligemma", paligemma_processor, paligemma_model, encode=encode_prefix),
)
