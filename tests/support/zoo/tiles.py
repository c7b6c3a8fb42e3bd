"""Families that cut a picture into squares, each of which is a picture to the vision tower."""

from __future__ import annotations

import transformers as hf
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from tests.support.tiny import PATCH

from .entry import Entry, encode_nested_chat
from .settings import square, text_settings, vision_settings
from .text import CHATML, chat_template, tokenizer

TILE_SIZE = 4 * PATCH
TOKENS_PER_TILE = 4


def internvl_processor() -> hf.InternVLProcessor:
    return hf.InternVLProcessor(
        image_processor=hf.GotOcr2ImageProcessor(size=square(TILE_SIZE), crop_to_patches=True, max_patches=4),
        tokenizer=tokenizer(
            eos="<|im_end|>",
            pad="<|endoftext|>",
            names={
                "start_image_token": "<img>",
                "end_image_token": "</img>",
                "context_image_token": "<IMG_CONTEXT>",
                "video_token": "<video>",
            },
            others=("<|im_start|>",),
        ),
        video_processor=hf.InternVLVideoProcessor(size=square(TILE_SIZE)),
        image_seq_length=TOKENS_PER_TILE,
        chat_template=chat_template(**CHATML, image="<IMG_CONTEXT>\n", video="<video>\n"),
    )


def internvl_model(processor: ProcessorMixin) -> PreTrainedModel:
    vision = vision_settings([TILE_SIZE] * 2, [PATCH] * 2, num_hidden_layers=2)
    return hf.InternVLForConditionalGeneration(
        hf.InternVLConfig(
            vision_config=hf.InternVLVisionConfig(**vision),
            text_config=hf.Qwen2Config(**text_settings(processor.tokenizer)),
            image_token_id=processor.image_token_id,
            image_seq_length=TOKENS_PER_TILE,
        )
    )


def idefics_tokenizer(bos: str) -> PreTrainedTokenizerBase:
    cells = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
    return tokenizer(
        bos=bos,
        eos="<end_of_utterance>",
        pad="<pad>",
        prepend_bos=True,
        names={"image_token": "<image>"},
        others=("<fake_token_around_image>", "<global-img>", *cells),
    )


def idefics_template(bos: str) -> str:
    return chat_template(
        start=bos,
        user="User:{}<end_of_utterance>\n",
        assistant="Assistant:{}<end_of_utterance>\n",
        system="System:{}<end_of_utterance>\n",
        image="<image>",
        space_before_text=True,
    )


IDEFICS_SIZES = {"size": {"longest_edge": 2 * TILE_SIZE}, "max_image_size": {"longest_edge": TILE_SIZE}}


def idefics3_processor() -> hf.Idefics3Processor:
    return hf.Idefics3Processor(
        image_processor=hf.Idefics3ImageProcessor(**IDEFICS_SIZES),
        tokenizer=idefics_tokenizer("<|begin_of_text|>"),
        image_seq_len=TOKENS_PER_TILE,
        chat_template=idefics_template("<|begin_of_text|>"),
    )


def smolvlm_processor() -> hf.SmolVLMProcessor:
    """Built without its ``__init__``, which insists on num2words; only the text about a video's frames needs that."""
    words = idefics_tokenizer("<|im_start|>")
    made = hf.SmolVLMProcessor.__new__(hf.SmolVLMProcessor)
    made.fake_image_token = "<fake_token_around_image>"
    made.image_token = "<image>"
    made.image_token_id = words.image_token_id
    made.end_of_utterance_token = "<end_of_utterance>"
    made.global_image_token = "<global-img>"
    made.video_token = "<video>"
    made.image_seq_len = TOKENS_PER_TILE
    ProcessorMixin.__init__(
        made,
        hf.SmolVLMImageProcessor(**IDEFICS_SIZES),
        words,
        hf.SmolVLMVideoProcessor(**IDEFICS_SIZES),
        chat_template=idefics_template("<|im_start|>"),
    )
    return made


def idefics_model(processor: ProcessorMixin, config: type, model: type) -> PreTrainedModel:
    return model(
        config(
            vision_config=vision_settings(TILE_SIZE, num_hidden_layers=2),
            text_config=hf.LlamaConfig(**text_settings(processor.tokenizer)),
            image_token_id=processor.image_token_id,
            scale_factor=2,
            pad_token_id=processor.tokenizer.pad_token_id,
        )
    )


def idefics3_model(processor: ProcessorMixin) -> PreTrainedModel:
    return idefics_model(processor, hf.Idefics3Config, hf.Idefics3ForConditionalGeneration)


def smolvlm_model(processor: ProcessorMixin) -> PreTrainedModel:
    return idefics_model(processor, hf.SmolVLMConfig, hf.SmolVLMForConditionalGeneration)


ENTRIES = (
    Entry("internvl", internvl_processor, internvl_model, dynamic=True),
    Entry("idefics3", idefics3_processor, idefics3_model, dynamic=True, encode=encode_nested_chat),
    Entry("smolvlm", smolvlm_processor, smolvlm_model, dynamic=True, encode=encode_nested_chat),
)
