"""Llama 3.2 Vision: tiles of pictures, read by cross-attention.

It is not part of ``ZOO``, whose batches mix rows of any number of pictures: the plain model doesn't keep such rows
apart. ``tests/patching/test_mllama.py`` holds it to the contract.
"""

from __future__ import annotations

import transformers as hf
from transformers import PreTrainedModel, ProcessorMixin

from tests.support.tiny import PATCH, WIDTH

from .entry import Entry, encode_nested_chat
from .settings import INITIALIZER_RANGE, square, text_settings
from .text import chat_template, tokenizer

TILE_SIZE = 2 * PATCH
_HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"


def mllama_processor() -> hf.MllamaProcessor:
    return hf.MllamaProcessor(
        image_processor=hf.MllamaImageProcessor(size=square(TILE_SIZE), max_image_tiles=4),
        tokenizer=tokenizer(
            bos="<|begin_of_text|>",
            eos="<|eot_id|>",
            pad="<|finetune_right_pad_id|>",
            others=("<|image|>", "<|python_tag|>", "<|start_header_id|>", "<|end_header_id|>"),
        ),
        chat_template=chat_template(
            start="<|begin_of_text|>",
            user=_HEADER.format("user") + "{}<|eot_id|>",
            assistant=_HEADER.format("assistant") + "{}<|eot_id|>",
            system=_HEADER.format("system") + "{}<|eot_id|>",
            image="<|image|>",
        ),
    )


def mllama_model(processor: ProcessorMixin) -> PreTrainedModel:
    words = processor.tokenizer
    made = hf.MllamaForConditionalGeneration(
        hf.MllamaConfig(
            vision_config=hf.MllamaVisionConfig(
                hidden_size=WIDTH,
                intermediate_size=2 * WIDTH,
                num_hidden_layers=2,
                num_global_layers=1,
                attention_heads=4,
                intermediate_layers_indices=[1],
                vision_output_dim=2 * WIDTH,
                image_size=TILE_SIZE,
                patch_size=PATCH,
                initializer_range=INITIALIZER_RANGE,
            ),
            text_config=hf.MllamaTextConfig(**text_settings(words, num_hidden_layers=3, cross_attention_layers=[1])),
            image_token_index=words.convert_tokens_to_ids("<|image|>"),
        )
    )
    for name, parameter in made.named_parameters():
        if name.endswith(("attn_gate", "mlp_gate")):
            parameter.data.fill_(1)  # At 0, where it starts, no picture is seen.
    return made


ENTRY = Entry("mllama", mllama_processor, mllama_model, encode=encode_nested_chat)
