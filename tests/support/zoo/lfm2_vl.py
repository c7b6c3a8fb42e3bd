"""LFM2-VL: tiles and small pictures, padded to one number of patches."""

from __future__ import annotations

import transformers as hf
from transformers import PreTrainedModel, ProcessorMixin

from tests.support.tiny import PATCH, WIDTH

from .entry import Entry, encode_nested_chat
from .settings import INITIALIZER_RANGE, text_settings
from .text import CHATML, chat_template, tokenizer

TILE = 4  # patches
PICTURE_TOKENS = {
    "image_token": "<image>",
    "image_start_token": "<|image_start|>",
    "image_end_token": "<|image_end|>",
    "image_thumbnail_token": "<|img_thumbnail|>",
}


def lfm2_vl_processor() -> hf.Lfm2VlProcessor:
    places = tuple(f"<|img_row_{row}_col_{column}|>" for row in range(1, 5) for column in range(1, 5))
    return hf.Lfm2VlProcessor(
        image_processor=hf.Lfm2VlImageProcessor(
            encoder_patch_size=PATCH,
            tile_size=TILE * PATCH,
            min_tiles=2,
            max_tiles=4,
            min_image_tokens=1,
            max_image_tokens=4,
            max_pixels_tolerance=1.0,
        ),
        tokenizer=tokenizer(
            bos="<|startoftext|>",
            eos="<|im_end|>",
            pad="<|pad|>",
            names=PICTURE_TOKENS,
            others=("<|im_start|>", *places),
        ),
        chat_template=chat_template(**CHATML, start="<|startoftext|>", image="<image>"),
    )


def lfm2_vl_model(processor: ProcessorMixin) -> PreTrainedModel:
    words = processor.tokenizer
    vision = hf.Siglip2VisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_patches=TILE**2,
        patch_size=PATCH,
        initializer_range=INITIALIZER_RANGE,
        vision_use_head=False,
    )
    return hf.Lfm2VlForConditionalGeneration(
        hf.Lfm2VlConfig(
            vision_config=vision,
            text_config=hf.Lfm2Config(**text_settings(words), layer_types=["conv", "full_attention"]),
            image_token_id=words.convert_tokens_to_ids("<image>"),
            projector_hidden_size=2 * WIDTH,
            initializer_range=INITIALIZER_RANGE,
        )
    )


ENTRIES = (Entry("lfm2_vl", lfm2_vl_processor, lfm2_vl_model, dynamic=True, encode=encode_nested_chat),)
