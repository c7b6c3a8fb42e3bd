"""The LLaVA of the benchmark: the digits' language model and pooling projector behind an EfficientNet."""

from __future__ import annotations

from typing import Any

from transformers import CLIPImageProcessor, LlavaConfig, LlavaProcessor

from ..digits_vqa.scenes import COLOURS, DIGITS
from ..digits_vqa.vlm import CHAT_TEMPLATE, SPECIAL_TOKENS, word_tokenizer
from ..digits_vqa.vlm import llava_config as digits_config
from .efficientnet import PIXEL_MEAN, PIXEL_STD, EfficientNetLiteConfig
from .scenes import CELLS, COLUMNS, IMAGE_SIZE, KIND_NAMES, ROWS

_ASKED = (
    "USER: ASSISTANT: ? what is at the colour ground behind in row column left of right above below how many cells "
    "show a there yes no empty"
)
VOCABULARY = tuple(
    dict.fromkeys((*SPECIAL_TOKENS, *DIGITS[: CELLS + 1], *COLOURS, *KIND_NAMES, *ROWS, *COLUMNS, *_ASKED.split()))
)
TOKEN_ID = {word: i for i, word in enumerate(VOCABULARY)}

#: Visual tokens of an image.
TOKENS_SIDE = 6


def llava_config(pooling: str = "1") -> LlavaConfig:
    config = digits_config(pooling)
    text: Any = config.text_config
    text.vocab_size = len(VOCABULARY)
    config.vision_config = EfficientNetLiteConfig(image_size=IMAGE_SIZE, patch_size=IMAGE_SIZE // TOKENS_SIDE)
    # There is no class token to drop.
    config.vision_feature_select_strategy = "full"
    return config


def processor() -> LlavaProcessor:
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(
            do_resize=False, do_center_crop=False, image_mean=[PIXEL_MEAN] * 3, image_std=[PIXEL_STD] * 3
        ),
        tokenizer=word_tokenizer(for_text_tower=False, vocabulary=VOCABULARY),
        # One placeholder an image, as the projector that pools to one token needs it.
        patch_size=IMAGE_SIZE,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=CHAT_TEMPLATE,
    )
