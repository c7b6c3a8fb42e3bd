"""Gemma 3n: a convolutional tower of timm, and a projector that also embeds the ids of special tokens."""

from __future__ import annotations

import copy

import transformers as hf
from transformers import PreTrainedModel, ProcessorMixin

from tests.support.tiny import WIDTH

from .entry import Entry, encode_nested_chat
from .settings import INITIALIZER_RANGE, square, text_settings
from .text import chat_template, tokenizer

GRID = 4
#: The tower's last two stages have a 4th and an 8th of this on each side, both multiples of the grid.
IMAGE_SIZE = 64
# The tower's last layer puts out as many, whatever the others do.
CHANNELS = 2048
_BLOCK = {"block_type": "er", "exp_ratio": 2, "exp_kernel_size": 3, "pw_kernel_size": 1, "act_layer": None}
_BLOCK |= {"force_in_chs": 0, "se_ratio": 0.0, "noskip": False}


def gemma3n_processor() -> hf.Gemma3nProcessor:
    return hf.Gemma3nProcessor(
        feature_extractor=hf.Gemma3nAudioFeatureExtractor(),
        image_processor=hf.SiglipImageProcessor(size=square(IMAGE_SIZE)),
        tokenizer=tokenizer(
            bos="<bos>",
            eos="<eos>",
            pad="<pad>",
            prepend_bos=True,
            # In the order of the published vocabulary: words, then what the image's projector embeds, then the audio's.
            names={
                "sot_token": "<start_of_turn>",
                "eot_token": "<end_of_turn>",
                "boi_token": "<start_of_image>",
                "boa_token": "<start_of_audio>",
                "eoi_token": "<end_of_image>",
                "image_token": "<image_soft_token>",
                "eoa_token": "<end_of_audio>",
                "audio_token": "<audio_soft_token>",
            },
        ),
        image_seq_length=GRID**2,
        chat_template=chat_template(
            start="<bos>",
            user="<start_of_turn>user\n{}<end_of_turn>\n",
            assistant="<start_of_turn>model\n{}<end_of_turn>\n",
            system="<start_of_turn>user\n{}\n\n",
            system_in_first_user=True,
            image="<image_soft_token>",
            text="part.text | trim",
        ),
    )


def gemma3n_model(processor: ProcessorMixin) -> PreTrainedModel:
    words = processor.tokenizer
    layers = [[{**_BLOCK, "stride": 2, "out_chs": channels}] for channels in (16, 32)]
    text = text_settings(
        words,
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
        activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0],
        head_dim=8,
        sliding_window=1024,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=words.eoi_token_id,
        altup_num_inputs=2,
        laurel_rank=4,
    )
    model = hf.Gemma3nForConditionalGeneration(
        hf.Gemma3nConfig(
            vision_config=hf.Gemma3nVisionConfig(
                model_args={"block_args": copy.deepcopy(layers), "stem_size": 8, "msfa_output_resolution": GRID},
                hidden_size=CHANNELS,
                vocab_offset=words.eoi_token_id,
                vocab_size=2,
                initializer_range=INITIALIZER_RANGE,
            ),
            audio_config=hf.Gemma3nAudioConfig(
                hidden_size=WIDTH,
                vocab_offset=words.eoa_token_id,
                vocab_size=2,
                conf_num_attention_heads=4,
                conf_num_hidden_layers=1,
                sscp_conv_channel_size=(8, 4),
                conf_reduction_factor=1,
            ),
            text_config=hf.Gemma3nTextConfig(**text),
            vision_soft_tokens_per_image=GRID**2,
            boi_token_id=words.boi_token_id,
            eoi_token_id=words.eoi_token_id,
            image_token_id=words.image_token_id,
            boa_token_id=words.boa_token_id,
            eoa_token_id=words.eoa_token_id,
            audio_token_id=words.audio_token_id,
        )
    )
    # timm has put its own defaults into them, which no config file can hold.
    model.config.vision_config.model_args["block_args"] = layers
    return model


ENTRIES = (Entry("gemma3n", gemma3n_processor, gemma3n_model, reads_ids=True, encode=encode_nested_chat),)
