"""MiniCPM-V: pictures with slices of them, merged in the vision tower and again after it."""

from __future__ import annotations

from typing import Any

import transformers as hf
from transformers import PreTrainedModel, ProcessorMixin

from .entry import Entry
from .qwen import qwen3_5_text
from .settings import vision_settings
from .text import CHATML, chat_template, tokenizer

PATCH = 4
# Pictures are made about as large as this square, and the larger ones cut into two slices, too.
SIDE = 12 * PATCH
NAMES = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "image_start_token": "<image>",
    "image_end_token": "</image>",
    "slice_start_token": "<slice>",
    "slice_end_token": "</slice>",
    "image_id_start_token": "<image_id>",
    "image_id_end_token": "</image_id>",
}


def minicpm_processor(processor: type[ProcessorMixin]) -> ProcessorMixin:
    settings = {"patch_size": PATCH, "scale_resolution": SIDE}
    return processor(
        image_processor=hf.MiniCPMV4_6ImageProcessor(**settings, max_slice_nums=2),
        video_processor=hf.MiniCPMV4_6VideoProcessor(**settings, max_slice_nums=1, do_sample_frames=False),
        tokenizer=tokenizer(eos="<|im_end|>", pad="<|endoftext|>", names=NAMES, others=("<|im_start|>",)),
        chat_template=chat_template(**CHATML, image="<|image_pad|>", video="<|video_pad|>"),
    )


def minicpm_settings(processor: ProcessorMixin, **text: Any) -> dict[str, Any]:
    return {
        "vision_config": vision_settings(2 * SIDE, PATCH),
        "text_config": {"model_type": "qwen3_5_text", **qwen3_5_text(processor, **text)},
        "image_token_id": processor.image_token_id,
        "video_token_id": processor.video_token_id,
        "insert_layer_id": 1,
    }


def minicpm4_6_model(processor: ProcessorMixin) -> PreTrainedModel:
    return hf.MiniCPMV4_6ForConditionalGeneration(hf.MiniCPMV4_6Config(**minicpm_settings(processor)))


def minicpm4_7_model(processor: ProcessorMixin) -> PreTrainedModel:
    words = processor.tokenizer
    [newline_id] = words.encode("\n", add_special_tokens=False)
    marks = {
        "image_start_id": words.image_start_token_id,
        "image_end_id": words.image_end_token_id,
        "slice_start_id": words.slice_start_token_id,
        "slice_end_id": words.slice_end_token_id,
        "newline_id": newline_id,
    }
    return hf.MiniCPMV4_7ForConditionalGeneration(hf.MiniCPMV4_7Config(**minicpm_settings(processor), **marks))


MINICPM = {"videos": True, "stacks_videos": False, "dynamic": True}
# Releases of transformers that don't have 4.7 yet may be unable to merge pictures of several shapes in one call of 4.6.
ENTRIES = (
    (
        Entry("minicpmv4_6", lambda: minicpm_processor(hf.MiniCPMV4_6Processor), minicpm4_6_model, **MINICPM),
        Entry(
            "minicpmv4_7",
            lambda: minicpm_processor(hf.MiniCPMV4_7Processor),
            minicpm4_7_model,
            reads_ids=True,
            **MINICPM,
        ),
    )
    if hasattr(hf, "MiniCPMV4_7Config")
    else ()
)
