"""Phi-4-multimodal, whose image processor counts on crops of 32 x 32 patches.

It is not part of ``ZOO``, whose tests ask for ``get_image_features`` and ``pixel_values``, which it doesn't have:
``tests/patching/test_phi4_multimodal.py`` holds it to the contract.
"""

from __future__ import annotations

import transformers as hf
from transformers import PreTrainedModel, ProcessorMixin

from tests.support.tiny import WIDTH

from .entry import Entry
from .settings import square, text_settings, vision_settings
from .text import chat_template, tokenizer

PATCH = 2
CROP = 32 * PATCH


def phi4_multimodal_processor() -> hf.Phi4MultimodalProcessor:
    return hf.Phi4MultimodalProcessor(
        image_processor=hf.Phi4MultimodalImageProcessor(size=square(CROP), patch_size=PATCH, dynamic_hd=4),
        audio_processor=hf.Phi4MultimodalFeatureExtractor(),
        tokenizer=tokenizer(
            bos="<|endoftext|>",
            eos="<|end|>",
            pad="<|pad|>",
            names={"image_token": "<|endoftext10|>", "audio_token": "<|endoftext11|>"},
            others=("<|user|>", "<|assistant|>", "<|system|>"),
        ),
        chat_template=chat_template(
            user="<|user|>{}<|end|>",
            assistant="<|assistant|>{}<|end|>",
            system="<|system|>{}<|end|>",
            image="<|endoftext10|>",
        ),
    )


def phi4_multimodal_model(processor: ProcessorMixin) -> PreTrainedModel:
    words = processor.tokenizer
    # With sdpa, transformers' tower attends causally where no image of a batch is padded.
    vision = vision_settings(
        CROP, PATCH, num_hidden_layers=2, num_attention_heads=1, crop_size=CROP, image_token_id=words.image_token_id
    )
    return hf.Phi4MultimodalForCausalLM(
        hf.Phi4MultimodalConfig(
            vision_config=vision,
            audio_config={
                "hidden_size": WIDTH,
                "intermediate_size": WIDTH,
                "num_blocks": 1,
                "num_attention_heads": 2,
                "ext_pw_out_channel": WIDTH,
                "depthwise_separable_out_channel": WIDTH,
                "nemo_conv_channels": WIDTH,
                "audio_token_id": words.audio_token_id,
            },
            **text_settings(words),
            attn_implementation="eager",
        )
    )


ENTRY = Entry("phi4_multimodal", phi4_multimodal_processor, phi4_multimodal_model, dynamic=True)
