"""Molmo2: pictures as a whole and in overlapping crops, pooled, and added to the embeddings of their placeholders."""

from __future__ import annotations

import transformers as hf
from transformers import PreTrainedModel, ProcessorMixin

from tests.support.tiny import PATCH, WIDTH

from .entry import Entry
from .settings import INITIALIZER_RANGE, square, text_settings
from .text import CHATML, chat_template, tokenizer

CROP_SIZE = 4 * PATCH
PICTURE_TOKENS = (
    *("<im_patch>", "<im_col>", "<im_start>", "<low_res_im_start>", "<im_end>", "<im_low>"),
    *("<frame_start>", "<frame_end>", "<|image|>", "<|video|>"),
)


def molmo2_processor() -> hf.Molmo2Processor:
    sizes = {"size": square(CROP_SIZE), "patch_size": PATCH, "pooling_size": [2, 2]}
    return hf.Molmo2Processor(
        image_processor=hf.Molmo2ImageProcessor(**sizes, max_crops=4, overlap_margins=[1, 1]),
        video_processor=hf.Molmo2VideoProcessor(**sizes, do_sample_frames=False),
        tokenizer=tokenizer(
            bos="<|endoftext|>", eos="<|im_end|>", pad="<|pad|>", others=("<|im_start|>", *PICTURE_TOKENS)
        ),
        chat_template=chat_template(**CHATML, start="<|endoftext|>", image="<|image|>", video="<|video|>"),
    )


def molmo2_model(processor: ProcessorMixin) -> PreTrainedModel:
    words = processor.tokenizer
    ids = dict(zip(PICTURE_TOKENS, words.convert_tokens_to_ids(list(PICTURE_TOKENS)), strict=True))
    # No logit stands for the tokens of pictures, which come last.
    text = text_settings(
        words, head_dim=8, vocab_size=ids["<im_patch>"], additional_vocab_size=len(words) - ids["<im_patch>"]
    )
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "hidden_size": WIDTH}
    sizes = {**heads, "intermediate_size": 2 * WIDTH, "initializer_range": INITIALIZER_RANGE}
    return hf.Molmo2ForConditionalGeneration(
        hf.Molmo2Config(
            vision_config=hf.Molmo2VisionConfig(
                **sizes, num_hidden_layers=3, image_size=[CROP_SIZE] * 2, patch_size=PATCH
            ),
            adapter_config=hf.Molmo2AdapterConfig(**sizes, vision_feature_layer=[2, 0], text_hidden_size=WIDTH),
            text_config=hf.Molmo2TextConfig(**text),
            image_patch_id=ids["<im_patch>"],
            image_start_token_id=ids["<im_start>"],
            low_res_image_start_token_id=ids["<low_res_im_start>"],
            image_end_token_id=ids["<im_end>"],
            frame_start_token_id=ids["<frame_start>"],
            frame_end_token_id=ids["<frame_end>"],
            initializer_range=INITIALIZER_RANGE,
        )
    )


# Came with transformers 5.24.
ENTRIES = (
    (
        Entry(
            "molmo2",
            molmo2_processor,
            molmo2_model,
            videos=True,
            mixes_media=False,
            videos_in_row=1,
            stacks_videos=False,
            dynamic=True,
        ),
    )
    if hasattr(hf, "Molmo2Config")
    else ()
)
