"""Ovis2: tiles of a picture, read as words of a visual vocabulary."""

from __future__ import annotations

import transformers as hf
from transformers import PreTrainedModel, ProcessorMixin

from tests.support.tiny import PATCH

from .entry import Entry
from .settings import square, text_settings, vision_settings
from .text import CHATML, chat_template, tokenizer

TILE_SIZE = 4 * PATCH
TOKENS_PER_TILE = 4
INDICATORS = ("<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")


def ovis2_processor() -> hf.Ovis2Processor:
    return hf.Ovis2Processor(
        image_processor=hf.Ovis2ImageProcessor(size=square(TILE_SIZE), crop_to_patches=True, max_patches=4),
        tokenizer=tokenizer(
            eos="<|im_end|>",
            pad="<|endoftext|>",
            others=("<|im_start|>", "<image>", "<IMG_ATOM>", *INDICATORS),
        ),
        image_seq_length=TOKENS_PER_TILE,
        chat_template=chat_template(**CHATML, image="<image>\n"),
    )


def ovis2_model(processor: ProcessorMixin) -> PreTrainedModel:
    words = processor.tokenizer
    text = text_settings(words)
    vision = vision_settings(TILE_SIZE, num_hidden_layers=2, hidden_stride=2, vocab_size=16)
    made = hf.Ovis2ForConditionalGeneration(
        hf.Ovis2Config(
            vision_config=hf.Ovis2VisionConfig(**vision),
            text_config=hf.Qwen2Config(**text),
            image_token_id=words.convert_tokens_to_ids("<IMG_ATOM>"),
            visual_indicator_token_ids=words.convert_tokens_to_ids(list(INDICATORS)),
            vocab_size=len(words),
            hidden_size=text["hidden_size"],
        )
    )
    # Mixtures of many small rows would all look the same.
    made.model.visual_embeddings_table.weight.data.normal_()
    return made


ENTRIES = (Entry("ovis2", ovis2_processor, ovis2_model, dynamic=True),)
