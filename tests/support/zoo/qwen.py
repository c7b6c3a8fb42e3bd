"""Qwen-VL: patches of all pictures in one sequence, and positions in three dimensions."""

from __future__ import annotations

from typing import Any

import transformers as hf
from transformers import PreTrainedModel, ProcessorMixin

from tests.support.tiny import PATCH, WIDTH

from .entry import Entry
from .settings import INITIALIZER_RANGE, text_settings
from .text import CHATML, chat_template, tokenizer

# In pixels of a whole picture: from one visual token to sixteen.
SIZE = {"shortest_edge": (2 * PATCH) ** 2, "longest_edge": 16 * (2 * PATCH) ** 2}
NAMES = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}
DEFAULT_SYSTEM = "You are a helpful assistant."


def qwen_processor(
    processor: type[ProcessorMixin], video_processor: type, *, default_system: str | None = None
) -> ProcessorMixin:
    settings = {"patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2, "size": SIZE}
    return processor(
        image_processor=hf.Qwen2VLImageProcessor(**settings),
        tokenizer=tokenizer(eos="<|im_end|>", pad="<|endoftext|>", names=NAMES, others=("<|im_start|>",)),
        video_processor=video_processor(**settings, do_sample_frames=False, cap_pixels_per_frame=False),
        chat_template=chat_template(
            **CHATML,
            image="<|vision_start|><|image_pad|><|vision_end|>",
            video="<|vision_start|><|video_pad|><|vision_end|>",
            default_system=default_system,
        ),
    )


def qwen3_processor() -> ProcessorMixin:
    return qwen_processor(hf.Qwen3VLProcessor, hf.Qwen3VLVideoProcessor)


def qwen_tokens(processor: ProcessorMixin) -> dict[str, int]:
    return {
        "image_token_id": processor.image_token_id,
        "video_token_id": processor.video_token_id,
        "vision_start_token_id": processor.tokenizer.vision_start_token_id,
        "vision_end_token_id": processor.tokenizer.vision_end_token_id,
    }


def qwen_vision(**changes: Any) -> dict[str, Any]:
    return {
        "depth": 2,
        "hidden_size": WIDTH,
        "num_heads": 4,
        "patch_size": PATCH,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "initializer_range": INITIALIZER_RANGE,
        **changes,
    }


def qwen_text(processor: ProcessorMixin, **changes: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    return text_settings(processor.tokenizer, rope_parameters=rope, **changes)


def qwen2_vl_model(processor: ProcessorMixin) -> PreTrainedModel:
    return hf.Qwen2VLForConditionalGeneration(
        hf.Qwen2VLConfig(
            vision_config=qwen_vision(embed_dim=WIDTH, mlp_ratio=2),
            text_config=qwen_text(processor),
            **qwen_tokens(processor),
        )
    )


def qwen2_5_vl_model(processor: ProcessorMixin) -> PreTrainedModel:
    vision = qwen_vision(
        out_hidden_size=WIDTH, intermediate_size=2 * WIDTH, window_size=4 * PATCH, fullatt_block_indexes=[1]
    )
    return hf.Qwen2_5_VLForConditionalGeneration(
        hf.Qwen2_5_VLConfig(vision_config=vision, text_config=qwen_text(processor), **qwen_tokens(processor))
    )


def qwen3_vision() -> dict[str, Any]:
    return qwen_vision(
        depth=3,
        out_hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_position_embeddings=64,
        deepstack_visual_indexes=[0, 1],
    )


def qwen3_vl_model(processor: ProcessorMixin) -> PreTrainedModel:
    return hf.Qwen3VLForConditionalGeneration(
        hf.Qwen3VLConfig(
            vision_config=qwen3_vision(), text_config=qwen_text(processor, head_dim=8), **qwen_tokens(processor)
        )
    )


def qwen3_vl_moe_model(processor: ProcessorMixin) -> PreTrainedModel:
    text = qwen_text(processor, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=WIDTH)
    return hf.Qwen3VLMoeForConditionalGeneration(
        hf.Qwen3VLMoeConfig(vision_config=qwen3_vision(), text_config=text, **qwen_tokens(processor))
    )


def qwen3_5_text(processor: ProcessorMixin, **changes: Any) -> dict[str, Any]:
    """One layer of linear attention, one of full attention."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.25}
    heads = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2}
    return text_settings(
        processor.tokenizer,
        rope_parameters=rope,
        head_dim=32,
        layer_types=["linear_attention", "full_attention"],
        linear_num_value_heads=4,
        **heads,
        **changes,
    )


def qwen3_5_vision() -> dict[str, Any]:
    return qwen_vision(out_hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_position_embeddings=64)


def experts_of_qwen3_5() -> dict[str, int]:
    return {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": WIDTH,
        "shared_expert_intermediate_size": WIDTH,
    }


def qwen3_5_model(processor: ProcessorMixin) -> PreTrainedModel:
    return hf.Qwen3_5ForConditionalGeneration(
        hf.Qwen3_5Config(vision_config=qwen3_5_vision(), text_config=qwen3_5_text(processor), **qwen_tokens(processor))
    )


def qwen3_5_moe_model(processor: ProcessorMixin) -> PreTrainedModel:
    text = qwen3_5_text(processor, **experts_of_qwen3_5())
    return hf.Qwen3_5MoeForConditionalGeneration(
        hf.Qwen3_5MoeConfig(vision_config=qwen3_5_vision(), text_config=text, **qwen_tokens(processor))
    )


def qwen4_exp_model(processor: ProcessorMixin) -> PreTrainedModel:
    text = qwen3_5_text(
        processor,
        hc_count=2,
        hc_lowrank=8,
        # Sparse attention, and embeddings of n-grams, by the ids of the prompt.
        **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16},
        **{"indexer_budget": 64, "indexer_compress_ratio": 2},
        **{"ple_layer_ids": [1], "heads_per_ngram": 2, "ngram_vocab_size_base": 64},
        **{"make_ngram_vocab_size_divisible_by": 1, "split_ngram_parts": 1},
        **experts_of_qwen3_5(),
    )
    return hf.Qwen4ExpForConditionalGeneration(
        hf.Qwen4ExpConfig(vision_config=qwen3_5_vision(), text_config=text, **qwen_tokens(processor))
    )


QWEN = {"videos": True, "stacks_videos": False, "dynamic": True, "reads_ids": True}
ENTRIES = (
    Entry(
        "qwen2_vl",
        lambda: qwen_processor(hf.Qwen2VLProcessor, hf.Qwen2VLVideoProcessor, default_system=DEFAULT_SYSTEM),
        qwen2_vl_model,
        **QWEN,
    ),
    Entry(
        "qwen2_5_vl",
        lambda: qwen_processor(hf.Qwen2_5_VLProcessor, hf.Qwen2VLVideoProcessor, default_system=DEFAULT_SYSTEM),
        qwen2_5_vl_model,
        **QWEN,
    ),
    Entry("qwen3_vl", qwen3_processor, qwen3_vl_model, **QWEN),
    Entry("qwen3_vl_moe", qwen3_processor, qwen3_vl_moe_model, **QWEN),
    Entry("qwen3_5", qwen3_processor, qwen3_5_model, **QWEN),
    Entry("qwen3_5_moe", qwen3_processor, qwen3_5_moe_model, **QWEN),
    Entry("qwen4_exp", qwen3_processor, qwen4_exp_model, **QWEN),
)
