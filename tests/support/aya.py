"""A tiny Aya Vision: a model that this library doesn't know, for the documentation's example of adding one."""

from __future__ import annotations

import torch
import transformers as hf

from tests.support.tiny import PATCH
from tests.support.zoo.settings import square, text_settings, vision_settings
from tests.support.zoo.text import CHATML, chat_template, tokenizer

TILE_SIZE = 4 * PATCH
TOKENS_PER_TILE = 4


def aya_processor() -> hf.AyaVisionProcessor:
    marks = ("<|im_start|>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>")
    return hf.AyaVisionProcessor(
        image_processor=hf.GotOcr2ImageProcessor(size=square(TILE_SIZE), crop_to_patches=True, max_patches=4),
        tokenizer=tokenizer(eos="<|im_end|>", pad="<|endoftext|>", names={"image_token": "<image>"}, others=marks),
        patch_size=PATCH,
        img_size=TILE_SIZE,
        downsample_factor=2,
        chat_template=chat_template(**CHATML, image="<image>"),
    )


def aya_vision() -> hf.AyaVisionForConditionalGeneration:
    torch.manual_seed(0)
    words = aya_processor().tokenizer
    config = hf.AyaVisionConfig(
        vision_config=hf.SiglipVisionConfig(**vision_settings(TILE_SIZE, vision_use_head=False)),
        text_config=hf.Cohere2Config(**text_settings(words)),
        image_token_index=words.convert_tokens_to_ids("<|IMG_PATCH|>"),
        downsample_factor=2,
        adapter_layer_norm_eps=1e-6,
    )
    return hf.AyaVisionForConditionalGeneration(config).eval()
