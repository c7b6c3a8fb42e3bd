"""GLM-V, GLM-5.3 and GLM-OCR: patches of all pictures in one sequence, and the frames of videos written as pictures."""

from __future__ import annotations

from typing import Any

import transformers as hf
from transformers import PreTrainedModel, ProcessorMixin

from tests.support.tiny import PATCH, WIDTH

from .entry import Entry
from .qwen import SIZE
from .settings import INITIALIZER_RANGE, text_settings
from .text import chat_template, tokenizer

MARKS = ("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>")
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")


def glm_processor(processor: type[ProcessorMixin], image_processor: type, video_processor: type) -> ProcessorMixin:
    settings = {"patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2, "size": SIZE}
    return processor(
        image_processor=image_processor(**settings),
        tokenizer=tokenizer(
            eos="<|endoftext|>",
            pad="<|endoftext|>",
            others=("<|image|>", "<|video|>", "[gMASK]", "<sop>", *MARKS, *ROLES),
        ),
        video_processor=video_processor(**settings, do_sample_frames=False),
        chat_template=chat_template(
            start="[gMASK]<sop>",
            user="<|user|>\n{}",
            assistant="<|assistant|>\n{}",
            system="<|system|>\n{}",
            image="<|begin_of_image|><|image|><|end_of_image|>",
            video="<|begin_of_video|><|video|><|end_of_video|>",
        ),
    )


def glm4v_processor() -> ProcessorMixin:
    return glm_processor(hf.Glm4vProcessor, hf.Glm4vImageProcessor, hf.Glm4vVideoProcessor)


def glm46v_processor() -> ProcessorMixin:
    return glm_processor(hf.Glm46VProcessor, hf.Glm46VImageProcessor, hf.Glm46VVideoProcessor)


def glm5_next_processor() -> ProcessorMixin:
    return glm_processor(hf.Glm5NextProcessor, hf.Glm5NextImageProcessor, hf.Glm5NextVideoProcessor)


def glm_tokens(processor: ProcessorMixin) -> dict[str, int]:
    names = ("image_start_token_id", "image_end_token_id", "video_start_token_id", "video_end_token_id")
    marks = dict(zip(names, processor.tokenizer.convert_tokens_to_ids(list(MARKS)), strict=True))
    return {"image_token_id": processor.image_token_id, "video_token_id": processor.video_token_id, **marks}


def glm_vision(**changes: Any) -> dict[str, Any]:
    return {
        "depth": 2,
        # Unlike the width of what the projector gets, so that neither is taken for the other.
        "hidden_size": 2 * WIDTH,
        "out_hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_heads": 4,
        "image_size": 4 * PATCH,
        "patch_size": PATCH,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "initializer_range": INITIALIZER_RANGE,
        **changes,
    }


def glm_text(processor: ProcessorMixin, **changes: Any) -> dict[str, Any]:
    # Half of a head of 16 channels turns, in three parts.
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return text_settings(processor.tokenizer, rope_parameters=rope, **heads, **changes)


def glm4v_model(processor: ProcessorMixin) -> PreTrainedModel:
    return hf.Glm4vForConditionalGeneration(
        hf.Glm4vConfig(vision_config=glm_vision(), text_config=glm_text(processor), **glm_tokens(processor))
    )


def glm46v_model(processor: ProcessorMixin) -> PreTrainedModel:
    return hf.Glm46VForConditionalGeneration(
        hf.Glm46VConfig(vision_config=glm_vision(), text_config=glm_text(processor), **glm_tokens(processor))
    )


def glm4v_moe_model(processor: ProcessorMixin) -> PreTrainedModel:
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": WIDTH}
    text = glm_text(processor, first_k_dense_replace=1, **experts)
    return hf.Glm4vMoeForConditionalGeneration(
        hf.Glm4vMoeConfig(vision_config=glm_vision(), text_config=text, **glm_tokens(processor))
    )


def glm_ocr_model(processor: ProcessorMixin) -> PreTrainedModel:
    return hf.GlmOcrForConditionalGeneration(
        hf.GlmOcrConfig(vision_config=glm_vision(), text_config=glm_text(processor), **glm_tokens(processor))
    )


def glm5_next_model(processor: ProcessorMixin) -> PreTrainedModel:
    text = text_settings(
        processor.tokenizer,
        num_key_value_heads=4,
        layer_types=["linear_attention", "full_attention"],
        mlp_layer_types=["dense", "sparse"],
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=WIDTH,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        v_head_dim=8,
        index_head_dim=8,
        index_n_heads=2,
        linear_head_dim=8,
        linear_num_heads=4,
        hc_mult=2,
    )
    vision = glm_vision(projection_intermediate_size=2 * WIDTH)
    return hf.Glm5NextForConditionalGeneration(
        hf.Glm5NextConfig(vision_config=vision, text_config=text, **glm_tokens(processor))
    )


GLM = {"videos": True, "mixes_media": False, "stacks_videos": False, "dynamic": True, "reads_ids": True}
ENTRIES = (
    Entry("glm4v", glm4v_processor, glm4v_model, **GLM),
    Entry("glm46v", glm46v_processor, glm46v_model, **GLM),
    Entry("glm4v_moe", glm4v_processor, glm4v_moe_model, **GLM),
    # As published, with the processor of GLM-4.6V.
    Entry("glm_ocr", glm46v_processor, glm_ocr_model, **GLM),
    Entry(
        "glm5_next",
        glm5_next_processor,
        glm5_next_model,
        videos=True,
        mixes_media=True,
        stacks_videos=False,
        dynamic=True,
    ),
)
