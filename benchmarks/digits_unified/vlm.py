"""The small Qwen3-VL of the benchmark: the stock transformers class at toy width, with tokenizer and processor.

Its geometry is that of the released models: patches of 16 pixels, merged 2x2 to 32 pixels a visual token, DeepStack,
interleaved M-RoPE, ChatML.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from .captions import WORDS

BASE_DIR = Path(__file__).parent / "base"

WIDTH = 128
PATCH, MERGE, FRAMES = 16, 2, 2

SPECIAL_TOKENS = (
    *("<|endoftext|>", "<unk>", "<|im_start|>", "<|im_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
)
VOCABULARY = (*SPECIAL_TOKENS, "user", "assistant", *WORDS)
TOKEN_ID = {word: i for i, word in enumerate(VOCABULARY)}

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|> {{ message['role'] }}"
    "{% if message['content'] is string %} {{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %} <|vision_start|><|image_pad|><|vision_end|>"
    "{% else %} {{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant{% endif %}"
)


def config() -> Qwen3VLConfig:
    return Qwen3VLConfig(
        text_config={
            "vocab_size": len(VOCABULARY),
            "hidden_size": WIDTH,
            "intermediate_size": 320,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 512,
            "pad_token_id": TOKEN_ID["<|endoftext|>"],
            "eos_token_id": TOKEN_ID["<|im_end|>"],
            "initializer_range": 0.05,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [6, 5, 5]},
        },
        vision_config={
            "depth": 4,
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_heads": 4,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": FRAMES,
            "out_hidden_size": WIDTH,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [1, 2],
            "initializer_range": 0.05,
        },
        image_token_id=TOKEN_ID["<|image_pad|>"],
        video_token_id=TOKEN_ID["<|video_pad|>"],
        vision_start_token_id=TOKEN_ID["<|vision_start|>"],
        vision_end_token_id=TOKEN_ID["<|vision_end|>"],
        tie_word_embeddings=False,
    )


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    words = Tokenizer(models.WordLevel(TOKEN_ID, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<|endoftext|>",
        unk_token="<unk>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        padding_side="left",
        model_max_length=512,
        extra_special_tokens={
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "vision_start_token": "<|vision_start|>",
            "vision_end_token": "<|vision_end|>",
        },
    )


def processor() -> Qwen3VLProcessor:
    settings: dict[str, Any] = {
        "patch_size": PATCH,
        "merge_size": MERGE,
        "temporal_patch_size": FRAMES,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        # In pixels of the whole picture: from one digit to 16x16 of them.
        "size": {"shortest_edge": 32 * 32, "longest_edge": 512 * 512},
    }
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**settings),
        tokenizer=tokenizer(),
        video_processor=Qwen3VLVideoProcessor(**settings),
        chat_template=CHAT_TEMPLATE,
    )


def to_pixel_values(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """``pixel_values`` and ``image_grid_thw``, as the image processor's, of pictures ``[n, 3, H, W]`` in [0, 1]."""
    n, _, height, width = pictures.shape
    rows, columns = height // PATCH, width // PATCH
    x = ((pictures - 0.5) / 0.5)[:, None].expand(n, FRAMES, 3, height, width)
    x = x.reshape(n, FRAMES, 3, rows // MERGE, MERGE, PATCH, columns // MERGE, MERGE, PATCH)
    x = x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return x.reshape(n * rows * columns, -1), torch.tensor([[1, rows, columns]] * n)


def load_base(folder: Path = BASE_DIR) -> Qwen3VLForConditionalGeneration:
    return Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
