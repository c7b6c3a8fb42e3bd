"""A tiny DeepSeek-VL: a model that this library doesn't know, for the documentation's example of adding one."""

from __future__ import annotations

import torch
import transformers as hf

from tests.support.tiny import PATCH
from tests.support.zoo.settings import square, text_settings, vision_settings
from tests.support.zoo.text import chat_template, tokenizer

IMAGE_SIZE = 2 * PATCH
TOKENS_PER_IMAGE = 4


def deepseek_processor() -> hf.DeepseekVLProcessor:
    return hf.DeepseekVLProcessor(
        image_processor=hf.DeepseekVLImageProcessor(size=square(IMAGE_SIZE)),
        tokenizer=tokenizer(
            bos="<|begin_of_sentence|>",
            eos="<|end_of_sentence|>",
            pad="<|pad|>",
            prepend_bos=True,
            names={"image_token": "<image_placeholder>"},
        ),
        num_image_tokens=TOKENS_PER_IMAGE,
        chat_template=chat_template(
            start="<|begin_of_sentence|>",
            user="User: {}\n\n",
            assistant="Assistant: {}<|end_of_sentence|>",
            system="{}\n\n",
            image="<image_placeholder>",
        ),
    )


def deepseek_vl() -> hf.DeepseekVLForConditionalGeneration:
    torch.manual_seed(0)
    words = deepseek_processor().tokenizer
    config = hf.DeepseekVLConfig(
        vision_config=hf.SiglipVisionConfig(**vision_settings(IMAGE_SIZE, vision_use_head=False)),
        text_config=hf.LlamaConfig(**text_settings(words)),
        image_token_id=words.image_token_id,
    )
    return hf.DeepseekVLForConditionalGeneration(config).eval()
