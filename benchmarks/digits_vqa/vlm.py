"""The small LLaVA of the benchmark: real transformers classes at toy width, with tokenizer and processor.

The one change to the stock model is a pooling projector. It gives the model what makes instruction-aware
visual tokens worth having: a bottleneck between the visual tokens and the language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from .pooled_llava import POOLINGS
from .scenes import COLOURS, DIGITS, IMAGE_SIZE

BASE_DIR = Path(__file__).parent / "base"
TEXT_TOWER_DIR = BASE_DIR / "text_tower"

PATCH_SIZE = 8
TEXT_CONTEXT = 24
PIXEL_MEAN = PIXEL_STD = 0.3

SPECIAL_TOKENS = ("<pad>", "<s>", "<unk>", "<image>", "</s>")
PAD, BOS, UNK, IMAGE, EOS = range(len(SPECIAL_TOKENS))
WORDS = [
    "USER:",
    "ASSISTANT:",
    "?",
    "what",
    "digit",
    "colour",
    "is",
    "at",
    "the",
    "top",
    "bottom",
    "left",
    "right",
    "of",
    "above",
    "below",
    "how",
    "many",
    "digits",
    "are",
    "there",
    "a",
    "yes",
    "no",
    "empty",
]
VOCABULARY = (*SPECIAL_TOKENS, *DIGITS, *COLOURS, *WORDS)
TOKEN_ID = {word: i for i, word in enumerate(VOCABULARY)}

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %} USER:{% else %} ASSISTANT:{% endif %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %} <image>{% else %} {{ part['text'] }}{% endif %}"
    "{% endfor %}"
    "{% if message['role'] == 'assistant' %} {{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


def vision_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=64,
    )


def text_tower_config() -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TEXT_CONTEXT,
        projection_dim=64,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )


def llava_config(pooling: str = "1", language_layers: int = 2) -> LlavaConfig:
    return LlavaConfig(
        pooling=pooling,  # type: ignore[call-arg]  # transformers keeps what it doesn't know
        vision_config=vision_config(),
        text_config=LlamaConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=language_layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
        ),
        image_token_index=IMAGE,
        image_seq_length=POOLINGS[pooling].tokens,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )


def word_tokenizer(*, for_text_tower: bool, vocabulary: Sequence[str] = VOCABULARY) -> PreTrainedTokenizerFast:
    """One token a word. The text tower's adds start and end tokens, as CLIP's does."""
    token_id = {word: i for i, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(token_id, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if for_text_tower:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        unk_token="<unk>",
        eos_token="</s>",
        padding_side="right" if for_text_tower else "left",
        model_max_length=TEXT_CONTEXT if for_text_tower else 128,
        extra_special_tokens={} if for_text_tower else {"image_token": "<image>"},
    )


def processor() -> LlavaProcessor:
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(
            do_resize=False,
            do_center_crop=False,
            image_mean=[PIXEL_MEAN] * 3,
            image_std=[PIXEL_STD] * 3,
        ),
        tokenizer=word_tokenizer(for_text_tower=False),
        # The projector pools an image to one token: for the count of placeholders that is one patch.
        patch_size=IMAGE_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def to_pixel_values(pictures: np.ndarray) -> torch.Tensor:
    """What the processor makes of uint8 pictures ``[n, H, W, 3]``: ``[n, 3, H, W]``, float32."""
    pixels = rearrange(torch.as_tensor(pictures), "n h w c -> n c h w").float() / 255
    return (pixels - PIXEL_MEAN) / PIXEL_STD
