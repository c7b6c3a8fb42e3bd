"""Gemma 4: pictures of any shape, pooled by their tower, and embeddings of the prompt's tokens in every layer."""

from __future__ import annotations

import inspect

import transformers as hf
from transformers import PreTrainedModel, ProcessorMixin

from tests.support.tiny import WIDTH

from .entry import Entry, encode_nested_chat
from .settings import INITIALIZER_RANGE, text_settings
from .text import chat_template, tokenizer

# The least that the processors take: pictures are enlarged, or made smaller, to about as many tokens.
TOKENS = 70
PATCH = 4
POOLING = 2


def gemma4_processor() -> hf.Gemma4Processor:
    settings = {"patch_size": PATCH, "pooling_kernel_size": POOLING, "max_soft_tokens": TOKENS}
    return hf.Gemma4Processor(
        feature_extractor=hf.Gemma4AudioFeatureExtractor(),
        image_processor=hf.Gemma4ImageProcessor(**settings),
        tokenizer=tokenizer(
            bos="<bos>",
            eos="<eos>",
            pad="<pad>",
            prepend_bos=True,
            names={
                "boi_token": "<|image>",
                "eoi_token": "<image|>",
                "image_token": "<|image|>",
                "boa_token": "<|audio>",
                "eoa_token": "<audio|>",
                "audio_token": "<|audio|>",
            },
            others=("<|turn>", "<turn|>", "<|video|>"),
        ),
        video_processor=hf.Gemma4VideoProcessor(**settings, do_sample_frames=False),
        chat_template=chat_template(
            start="<bos>",
            user="<|turn>user\n{}<turn|>\n",
            assistant="<|turn>model\n{}<turn|>\n",
            system="<|turn>system\n{}<turn|>\n",
            image="<|image|>",
            video="<|video|>",
            text="part.text | trim",
        ),
    )


def gemma4_model(processor: ProcessorMixin) -> PreTrainedModel:
    words = processor.tokenizer
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "patch_size": PATCH,
        "pooling_kernel_size": POOLING,
        "position_embedding_size": TOKENS * POOLING,
        "initializer_range": INITIALIZER_RANGE,
    }
    # All that checkpoints differ in, but for layers that share keys and values: see tests/patching/test_gemma4.py.
    text = text_settings(
        words,
        layer_types=["sliding_attention", "full_attention"],
        head_dim=8,
        global_head_dim=16,
        attention_k_eq_v=True,
        sliding_window=1024,
        use_bidirectional_attention="vision",
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=len(words),
    )
    made = hf.Gemma4ForConditionalGeneration(
        hf.Gemma4Config(
            vision_config=hf.Gemma4VisionConfig(**vision),
            text_config=hf.Gemma4TextConfig(**text),
            boi_token_id=words.boi_token_id,
            eoi_token_id=words.eoi_token_id,
            image_token_id=processor.image_token_id,
            video_token_id=processor.video_token_id,
            boa_token_id=words.boa_token_id,
            eoa_token_index=words.eoa_token_id,
            audio_token_id=words.audio_token_id,
        )
    )
    # Transformers starts all at one, beside which no picture is seen.
    made.model.vision_tower.patch_embedder.position_embedding_table.data.normal_(std=INITIALIZER_RANGE)
    return made


# Older transformers stack videos, and know no numbers of frames.
STACKS_VIDEOS = "num_frames_per_video" not in inspect.signature(hf.Gemma4ForConditionalGeneration.forward).parameters
ENTRIES = (
    Entry(
        "gemma4",
        gemma4_processor,
        gemma4_model,
        videos=True,
        stacks_videos=STACKS_VIDEOS,
        dynamic=True,
        encode=encode_nested_chat,
    ),
)
