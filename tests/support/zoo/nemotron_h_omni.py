"""Nemotron 3 Nano Omni: a RADIO tower, an audio tower, and a language model of Mamba, attention and expert layers.

It is not part of ``ZOO``, whose tests take a class for one of a model inside another, and videos for several prompts:
``tests/patching/test_nemotron_h_omni.py`` holds it to the contract.
"""

from __future__ import annotations

import transformers as hf
from transformers import PreTrainedModel, ProcessorMixin

from tests.support.tiny import PATCH, WIDTH

from .entry import Entry
from .settings import INITIALIZER_RANGE, text_settings
from .text import CHATML, chat_template, tokenizer

MEL_BINS = 16
NORMALIZED = {"norm_mean": [0.5] * 3, "norm_std": [0.5] * 3}


def nemotron_h_omni_processor() -> hf.NemotronH_Omni_Reasoning_V3Processor:
    return hf.NemotronH_Omni_Reasoning_V3Processor(
        image_processor=hf.NemotronH_Omni_Reasoning_V3ImageProcessor(
            patch_size=PATCH, min_num_patches=4, max_num_patches=64, **NORMALIZED
        ),
        video_processor=hf.NemotronH_Omni_Reasoning_V3VideoProcessor(
            patch_size=PATCH, video_target_num_patches=24, do_sample_frames=False, **NORMALIZED
        ),
        feature_extractor=hf.ParakeetFeatureExtractor(feature_size=MEL_BINS),
        tokenizer=tokenizer(
            bos="<s>",
            eos="<|im_end|>",
            pad="<unk>",
            names={"image_token": "<image>", "video_token": "<video>", "audio_token": "<so_embedding>"},
            others=("<|im_start|>", "<img>", "</img>", "<so_start>", "<so_end>"),
        ),
        chat_template=chat_template(**CHATML, image="<image>", video="<video>"),
    )


def nemotron_h_omni_model(processor: ProcessorMixin) -> PreTrainedModel:
    words = processor.tokenizer
    text = text_settings(
        words,
        layers_block_type=["linear_attention", "moe", "full_attention", "mlp"],
        head_dim=8,
        ssm_state_size=8,
        mamba_num_heads=4,
        mamba_head_dim=8,
        n_groups=2,
        chunk_size=16,
        n_routed_experts=4,
        moe_intermediate_size=WIDTH,
        moe_shared_expert_intermediate_size=WIDTH,
    )
    del text["num_hidden_layers"]
    heads = {"hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 4}
    return hf.NemotronH_Omni_Reasoning_V3(
        hf.NemotronH_Omni_Reasoning_V3_Config(
            vision_config=hf.RadioConfig(
                **heads,
                mlp_ratio=2.0,
                patch_size=PATCH,
                max_img_size=16 * PATCH,
                video_temporal_patch_size=2,
                initializer_range=INITIALIZER_RANGE,
                torch_dtype="float32",
            ),
            text_config=hf.NemotronHConfig(**text),
            audio_config=hf.ParakeetEncoderConfig(
                **heads,
                intermediate_size=2 * WIDTH,
                subsampling_conv_channels=8,
                num_mel_bins=MEL_BINS,
                projection_hidden_size=WIDTH,
                projection_bias=False,
                initializer_range=INITIALIZER_RANGE,
            ),
            vision_hidden_size=WIDTH,
            projector_hidden_size=2 * WIDTH,
            image_token_id=words.image_token_id,
            video_token_id=words.video_token_id,
            audio_token_id=words.audio_token_id,
            initializer_range=INITIALIZER_RANGE,
        )
    )


ENTRY = Entry(
    "nemotron_h_omni",
    nemotron_h_omni_processor,
    nemotron_h_omni_model,
    videos=True,
    mixes_media=False,
    dynamic=True,
)
