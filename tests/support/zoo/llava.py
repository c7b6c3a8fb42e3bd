"""LLaVA and its kin."""

from __future__ import annotations

from typing import Any

import transformers as hf
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from tests.support import tiny
from tests.support.tiny import IMAGE_SIZE, PATCH, WIDTH

from .entry import Entry, encode_nested_chat
from .settings import square, text_settings, vision_settings
from .text import chat_template, tokenizer

# Neither ends an answer.
VICUNA = {"user": "USER: {} ", "assistant": "ASSISTANT: {} ", "system": "{} ", "image": "<image>\n"}
VIPLLAVA = {"user": "###Human: {}", "assistant": "###Assistant: {}", "system": "{}", "image": "<image>\n"}


def pinpoints(side: int) -> list[list[int]]:
    """Resolutions, (height, width), of which an any-resolution processor chooses one for each picture."""
    return [[side * rows, side * columns] for rows, columns in ((1, 2), (2, 1), (2, 2), (1, 3), (3, 1))]


# LLaVA 1.5 and its kin: a CLIP tower whose CLS token is dropped, so many tokens for every picture.


def llava_tokenizer(**names: str) -> PreTrainedTokenizerBase:
    return tokenizer(bos="<s>", eos="</s>", pad="<pad>", prepend_bos=True, names={"image_token": "<image>", **names})


def llava_processor(template: str) -> hf.LlavaProcessor:
    return hf.LlavaProcessor(
        image_processor=hf.CLIPImageProcessor(size=square(IMAGE_SIZE), crop_size=square(IMAGE_SIZE)),
        tokenizer=llava_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


def llava_model(processor: ProcessorMixin) -> PreTrainedModel:
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(
            vision_config=hf.CLIPVisionConfig(**vision_settings(IMAGE_SIZE, projection_dim=WIDTH)),
            text_config=hf.LlamaConfig(**text_settings(processor.tokenizer)),
            image_token_index=processor.image_token_id,
            image_seq_length=tiny.TOKENS_PER_IMAGE,
        )
    )


def vipllava_model(processor: ProcessorMixin) -> PreTrainedModel:
    return hf.VipLlavaForConditionalGeneration(
        hf.VipLlavaConfig(
            vision_config=hf.CLIPVisionConfig(**vision_settings(IMAGE_SIZE, projection_dim=WIDTH)),
            text_config=hf.LlamaConfig(**text_settings(processor.tokenizer)),
            image_token_index=processor.image_token_id,
            image_seq_length=tiny.TOKENS_PER_IMAGE,
            vision_feature_layers=[-2, -3, 1],
        )
    )


# Any resolution: the whole picture and as many tiles as its best pinpoint has, unpadded, with a newline token a row.


def llava_next_processor() -> hf.LlavaNextProcessor:
    return hf.LlavaNextProcessor(
        image_processor=hf.LlavaNextImageProcessor(
            size={"shortest_edge": IMAGE_SIZE},
            crop_size=square(IMAGE_SIZE),
            image_grid_pinpoints=pinpoints(IMAGE_SIZE),
        ),
        tokenizer=llava_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template(
            user="[INST] {} [/INST]",
            assistant=" {}</s> ",
            system="<<SYS>>\n{}\n<</SYS>>\n\n",
            image="<image>\n",
        ),
    )


def llava_next_model(processor: ProcessorMixin) -> PreTrainedModel:
    return hf.LlavaNextForConditionalGeneration(
        hf.LlavaNextConfig(
            vision_config=hf.CLIPVisionConfig(**vision_settings(IMAGE_SIZE, projection_dim=WIDTH)),
            text_config=hf.LlamaConfig(**text_settings(processor.tokenizer)),
            image_token_index=processor.image_token_id,
            image_grid_pinpoints=pinpoints(IMAGE_SIZE),
        )
    )


# Large enough for a frame's tokens, pooled 2x2, to be several.
NEXT_VIDEO_SIZE = 4 * PATCH


def llava_next_video_processor() -> hf.LlavaNextVideoProcessor:
    size = {"size": {"shortest_edge": NEXT_VIDEO_SIZE}, "crop_size": square(NEXT_VIDEO_SIZE)}
    return hf.LlavaNextVideoProcessor(
        video_processor=hf.LlavaNextVideoVideoProcessor(**size),
        image_processor=hf.LlavaNextImageProcessor(**size, image_grid_pinpoints=pinpoints(NEXT_VIDEO_SIZE)),
        tokenizer=llava_tokenizer(video_token="<video>"),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template(**VICUNA, video="<video>\n"),
    )


def llava_next_video_model(processor: ProcessorMixin) -> PreTrainedModel:
    return hf.LlavaNextVideoForConditionalGeneration(
        hf.LlavaNextVideoConfig(
            vision_config=hf.CLIPVisionConfig(**vision_settings(NEXT_VIDEO_SIZE, projection_dim=WIDTH)),
            text_config=hf.LlamaConfig(**text_settings(processor.tokenizer)),
            image_token_index=processor.image_token_id,
            video_token_index=processor.video_token_id,
            image_grid_pinpoints=pinpoints(NEXT_VIDEO_SIZE),
        )
    )


# An odd grid, like SigLIP's 27x27, because pooling a frame's tokens rounds up; and so low a limit that the tiles of
# large pictures are interpolated and those of small ones are not.
ONEVISION_SIZE = 3 * PATCH
ONEVISION_ASPECT = "anyres_max_3"


def llava_onevision_processor() -> hf.LlavaOnevisionProcessor:
    return hf.LlavaOnevisionProcessor(
        image_processor=hf.LlavaOnevisionImageProcessor(
            size=square(ONEVISION_SIZE), image_grid_pinpoints=pinpoints(ONEVISION_SIZE)
        ),
        tokenizer=tokenizer(
            eos="<|im_end|>",
            pad="<|endoftext|>",
            names={"image_token": "<image>", "video_token": "<video>"},
            others=("<|im_start|>",),
        ),
        video_processor=hf.LlavaOnevisionVideoProcessor(size=square(ONEVISION_SIZE)),
        num_image_tokens=9,
        vision_feature_select_strategy="full",
        vision_aspect_ratio=ONEVISION_ASPECT,
        chat_template=chat_template(
            user="<|im_start|>user {}<|im_end|>",
            assistant="<|im_start|>assistant {}<|im_end|>",
            system="<|im_start|>system {}<|im_end|>",
            image="<image>",
            video="<video>",
            text="'\\n' + part.text",
            generation="<|im_start|>assistant\n",
        ),
    )


def llava_onevision_model(processor: ProcessorMixin) -> PreTrainedModel:
    return hf.LlavaOnevisionForConditionalGeneration(
        hf.LlavaOnevisionConfig(
            vision_config=hf.SiglipVisionConfig(**vision_settings(ONEVISION_SIZE, vision_use_head=False)),
            text_config=hf.Qwen2Config(**text_settings(processor.tokenizer)),
            image_token_index=processor.image_token_id,
            video_token_index=processor.video_token_id,
            image_grid_pinpoints=pinpoints(ONEVISION_SIZE),
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            vision_aspect_ratio=ONEVISION_ASPECT,
        )
    )


# Pixtral towers: every picture keeps its size, and its rows end in a token that is no visual one.

PIXTRAL_SIZE = 8 * PATCH


def pixtral_processor(
    spatial_merge_size: int, *, system: str, default_system: str | None = None
) -> hf.PixtralProcessor:
    return hf.PixtralProcessor(
        image_processor=hf.PixtralImageProcessor(size={"longest_edge": PIXTRAL_SIZE}, patch_size=square(PATCH)),
        tokenizer=tokenizer(
            bos="<s>",
            eos="</s>",
            pad="<pad>",
            prepend_bos=True,
            names={"image_token": "[IMG]"},
            others=("[IMG_BREAK]", "[IMG_END]", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
        ),
        patch_size=PATCH,
        spatial_merge_size=spatial_merge_size,
        chat_template=chat_template(
            start="<s>",
            user="[INST]{}[/INST]",
            assistant="{}</s>",
            system=system,
            image="[IMG]",
            default_system=default_system,
        ),
    )


def pixtral_vision(processor: ProcessorMixin) -> dict[str, Any]:
    return {
        "vision_config": hf.PixtralVisionConfig(**vision_settings(PIXTRAL_SIZE, num_hidden_layers=2)),
        "image_token_index": processor.image_token_id,
        "vision_feature_layer": -1,
    }


def llava_pixtral_model(processor: ProcessorMixin) -> PreTrainedModel:
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(
            **pixtral_vision(processor),
            text_config=hf.MistralConfig(**text_settings(processor.tokenizer, head_dim=8)),
            vision_feature_select_strategy="full",
        )
    )


def mistral3_model(processor: ProcessorMixin) -> PreTrainedModel:
    return hf.Mistral3ForConditionalGeneration(
        hf.Mistral3Config(
            **pixtral_vision(processor),
            text_config=hf.MistralConfig(**text_settings(processor.tokenizer, head_dim=8)),
            spatial_merge_size=2,
        )
    )


ENTRIES = (
    Entry("llava", lambda: llava_processor(tiny.CHAT_TEMPLATE), llava_model),
    Entry("llava_pixtral", lambda: pixtral_processor(1, system="[INST]{}[/INST]"), llava_pixtral_model, dynamic=True),
    Entry("vipllava", lambda: llava_processor(chat_template(**VIPLLAVA)), vipllava_model),
    Entry("llava_next", llava_next_processor, llava_next_model, dynamic=True),
    Entry("llava_next_video", llava_next_video_processor, llava_next_video_model, videos=True, dynamic=True),
    Entry(
        "llava_onevision",
        llava_onevision_processor,
        llava_onevision_model,
        videos=True,
        dynamic=True,
        encode=encode_nested_chat,
    ),
    Entry(
        "mistral3",
        lambda: pixtral_processor(
            2,
            system="[SYSTEM_PROMPT]{}[/SYSTEM_PROMPT]",
            default_system="You are Mistral Small 3.1, a model by Mistral AI.",
        ),
        mistral3_model,
        dynamic=True,
    ),
)
