"""Kimi K2.5: pictures that keep their size, videos in chunks of frames, and a language model of experts."""

from __future__ import annotations

import transformers as hf
from packaging.version import Version
from transformers import PreTrainedModel, ProcessorMixin

from tests.support.tiny import PATCH, WIDTH

from .entry import Entry
from .settings import text_settings
from .text import chat_template, tokenizer

FRAMES_OF_A_CHUNK = 4
MARKS = ("<|media_begin|>", "<|media_content|>", "<|media_end|>")
ROLES = ("<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>")


def kimi_processor() -> ProcessorMixin:
    settings = {"patch_size": PATCH, "size": {"max_height": 16, "max_width": 16}}
    names = {"image_token": "<|media_pad|>", "video_token": "<|kimi_k25_video_placeholder|>"}
    before, within, after = MARKS
    return hf.Kimi_K25Processor(
        image_processor=hf.Kimi_K25ImageProcessor(**settings),
        video_processor=hf.Kimi_K25VideoProcessor(
            **settings, temporal_patch_size=FRAMES_OF_A_CHUNK, do_sample_frames=False
        ),
        tokenizer=tokenizer(eos="<|im_end|>", pad="[PAD]", names=names, others=(*MARKS, *ROLES)),
        chat_template=chat_template(
            user="<|im_user|>user<|im_middle|>{}<|im_end|>",
            assistant="<|im_assistant|>assistant<|im_middle|>{}<|im_end|>",
            system="<|im_system|>system<|im_middle|>{}<|im_end|>",
            image=f"{before}image{within}{names['image_token']}{after}\n",
            video=f"{names['video_token']}\n",
        ),
    )


def kimi_model(processor: ProcessorMixin) -> PreTrainedModel:
    words = processor.tokenizer
    vision = {
        "patch_size": PATCH,
        "pos_emb_height": 8,
        "pos_emb_width": 8,
        "pos_emb_time": FRAMES_OF_A_CHUNK,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
    }
    experts = {
        **{"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 2},
        **{"moe_intermediate_size": WIDTH, "first_k_dense_replace": 1, "num_mtp_layers": 0},
    }
    heads = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    text = text_settings(words, num_key_value_heads=4, **experts, **heads)
    return hf.Kimi_K25ForConditionalGeneration(
        hf.Kimi_K25Config(
            vision_config=vision,
            text_config={"model_type": "deepseek_v3", **text},
            projection_hidden_size=WIDTH,
            image_token_id=processor.image_token_id,
            video_token_id=processor.video_token_id,
            tie_word_embeddings=False,
        )
    )


# In transformers 5.17, the model takes no videos with a chunk of fewer frames than others.
ENTRIES = (
    (Entry("kimi_k25", kimi_processor, kimi_model, videos=True, stacks_videos=False, dynamic=True),)
    if Version(hf.__version__) >= Version("5.18")
    else ()
)
