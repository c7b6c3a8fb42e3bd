"""Command A Vision and Aya Vision: tiles, of whose tokens the projector merges squares."""

from __future__ import annotations

import transformers as hf
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from tests.support.tiny import PATCH

from .entry import Entry
from .settings import square, text_settings, vision_settings
from .text import chat_template, tokenizer

TILE_SIZE = 4 * PATCH
MERGE = 2

TEMPLATE = chat_template(
    start="<BOS_TOKEN>",
    user="<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{}<|END_OF_TURN_TOKEN|>",
    assistant="<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{}<|END_OF_TURN_TOKEN|>",
    system="<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>{}<|END_OF_TURN_TOKEN|>",
    image="{image}",
)


def cohere_tokenizer(names: dict[str, str], *others: str) -> PreTrainedTokenizerBase:
    roles = ("<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>")
    return tokenizer(
        bos="<BOS_TOKEN>",
        eos="<|END_OF_TURN_TOKEN|>",
        pad="<PAD>",
        prepend_bos=True,
        names=names,
        others=(*roles, *others),
    )


def cohere2_vision_processor() -> hf.Cohere2VisionProcessor:
    names = {
        "boi_token": "<|START_OF_IMG|>",
        "eoi_token": "<|END_OF_IMG|>",
        "image_token": "<|IMG_PATCH|>",
        "img_line_break_token": "<|IMG_LINE_BREAK|>",
    }
    return hf.Cohere2VisionProcessor(
        # It takes the square of "patch_size" for the number of a tile's tokens.
        image_processor=hf.Cohere2VisionImageProcessor(size=square(TILE_SIZE), patch_size=MERGE, max_patches=4),
        tokenizer=cohere_tokenizer(names),
        chat_template=TEMPLATE.replace("{image}", "<|IMG_PATCH|>"),
    )


def aya_vision_processor() -> hf.AyaVisionProcessor:
    marks = ("<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "TILE_GLOBAL")
    tiles = tuple(f"TILE_{number}" for number in range(1, 5))
    return hf.AyaVisionProcessor(
        image_processor=hf.GotOcr2ImageProcessor(size=square(TILE_SIZE), crop_to_patches=True, max_patches=4),
        tokenizer=cohere_tokenizer({"image_token": "<image>"}, *marks, *tiles),
        patch_size=PATCH,
        img_size=TILE_SIZE,
        downsample_factor=MERGE,
        chat_template=TEMPLATE.replace("{image}", "<image>"),
    )


def cohere_parts(processor: ProcessorMixin) -> dict[str, object]:
    return {
        "vision_config": hf.SiglipVisionConfig(**vision_settings(TILE_SIZE, vision_use_head=False)),
        "text_config": hf.Cohere2Config(**text_settings(processor.tokenizer)),
        "downsample_factor": MERGE,
    }


def cohere2_vision_model(processor: ProcessorMixin) -> PreTrainedModel:
    return hf.Cohere2VisionForConditionalGeneration(
        hf.Cohere2VisionConfig(
            **cohere_parts(processor), image_token_id=processor.image_token_id, alignment_intermediate_size=64
        )
    )


def aya_vision_model(processor: ProcessorMixin) -> PreTrainedModel:
    return hf.AyaVisionForConditionalGeneration(
        hf.AyaVisionConfig(**cohere_parts(processor), image_token_index=processor.image_token_id)
    )


ENTRIES = (
    Entry("cohere2_vision", cohere2_vision_processor, cohere2_vision_model, dynamic=True),
    Entry("aya_vision", aya_vision_processor, aya_vision_model, dynamic=True),
)
