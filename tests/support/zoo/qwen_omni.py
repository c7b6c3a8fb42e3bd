"""Qwen-Omni: the thinkers, which hear as well as see, and the models around them, which also speak."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from transformers import PreTrainedModel, ProcessorMixin

from tests.support.tiny import PATCH, WIDTH

from .entry import Entry, encode_chat
from .qwen import DEFAULT_SYSTEM, QWEN, SIZE, qwen3_vision, qwen_text, qwen_vision
from .settings import INITIALIZER_RANGE, text_settings
from .text import CHATML, chat_template, tokenizer

NAMES_OF_2_5 = {
    "image_token": "<|IMAGE|>",
    "video_token": "<|VIDEO|>",
    "audio_token": "<|AUDIO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}
NAMES_OF_3 = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "audio_token": "<|audio_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
    "audio_bos_token": "<|audio_start|>",
    "audio_eos_token": "<|audio_end|>",
}


def omni_processor(
    processor: type[ProcessorMixin], names: dict[str, str], *, default_system: str | None = None
) -> ProcessorMixin:
    settings = {"patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2, "size": SIZE}
    return processor(
        image_processor=hf.Qwen2VLImageProcessor(**settings),
        video_processor=hf.Qwen2VLVideoProcessor(**settings, do_sample_frames=False, cap_pixels_per_frame=False),
        feature_extractor=hf.WhisperFeatureExtractor(feature_size=MELS),
        tokenizer=tokenizer(eos="<|im_end|>", pad="<|endoftext|>", names=names, others=("<|im_start|>",)),
        chat_template=chat_template(
            **CHATML,
            image=f"{names['vision_bos_token']}{names['image_token']}{names['vision_eos_token']}",
            video=f"{names['vision_bos_token']}{names['video_token']}{names['vision_eos_token']}",
            default_system=default_system,
        ),
    )


def omni_tokens(processor: ProcessorMixin) -> dict[str, int]:
    words = processor.tokenizer
    return {
        "image_token_id": words.image_token_id,
        "video_token_id": words.video_token_id,
        "audio_token_id": words.audio_token_id,
        "vision_start_token_id": words.vision_bos_token_id,
        "audio_start_token_id": words.audio_bos_token_id,
        "audio_end_token_id": words.audio_eos_token_id,
    }


MELS = 16
AUDIO = {
    "num_mel_bins": MELS,
    "encoder_layers": 1,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": WIDTH,
    "d_model": WIDTH,
    "output_dim": WIDTH,
    "initializer_range": INITIALIZER_RANGE,
}


def qwen2_5_omni_processor() -> ProcessorMixin:
    return omni_processor(hf.Qwen2_5OmniProcessor, NAMES_OF_2_5, default_system=DEFAULT_SYSTEM)


def qwen3_omni_processor() -> ProcessorMixin:
    return omni_processor(hf.Qwen3OmniMoeProcessor, NAMES_OF_3)


def qwen2_5_thinker_config(processor: ProcessorMixin) -> hf.Qwen2_5OmniThinkerConfig:
    vision = qwen_vision(
        out_hidden_size=WIDTH, intermediate_size=2 * WIDTH, window_size=4 * PATCH, fullatt_block_indexes=[1]
    )
    return hf.Qwen2_5OmniThinkerConfig(
        audio_config=AUDIO, vision_config=vision, text_config=qwen_text(processor), **omni_tokens(processor)
    )


def qwen3_thinker_config(processor: ProcessorMixin) -> Any:
    text = qwen_text(processor, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=WIDTH)
    audio = {**AUDIO, "downsample_hidden_size": 8}
    vision = qwen3_vision()
    return hf.Qwen3OmniMoeThinkerConfig(
        audio_config=audio, vision_config=vision, text_config=text, **omni_tokens(processor)
    )


def qwen2_5_thinker(processor: ProcessorMixin) -> PreTrainedModel:
    return hf.Qwen2_5OmniThinkerForConditionalGeneration(qwen2_5_thinker_config(processor))


def qwen3_thinker(processor: ProcessorMixin) -> PreTrainedModel:
    return hf.Qwen3OmniMoeThinkerForConditionalGeneration(qwen3_thinker_config(processor))


def qwen2_5_omni() -> PreTrainedModel:
    """The thinker, with what speaks."""
    processor = qwen2_5_omni_processor()
    words = processor.tokenizer
    talker = {
        **qwen_text(processor, head_dim=8, vocab_size=32),
        **{"embedding_size": WIDTH, "spatial_merge_size": 2, "pad_token_id": 28},
        **{"tts_codec_start_token_id": 29, "tts_codec_end_token_id": 30, "tts_codec_pad_token_id": 28},
        **{"tts_codec_mask_token_id": 31, "tts_text_start_token_id": 1, "tts_text_end_token_id": 2},
        **{"tts_text_pad_token_id": 3, "image_token_index": words.image_token_id},
        **{"video_token_index": words.video_token_id, "audio_token_index": words.audio_token_id},
    }
    channels = {"enc_channels": [8, 8, 8], "enc_kernel_sizes": [3, 3, 1], "enc_dilations": [1, 1, 1]}
    mel = {
        **{"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 8, "emb_dim": 8},
        **{"num_embeds": 32, "mel_dim": 8, "enc_emb_dim": 8, "enc_dim": 8, "enc_attention_channels": 8},
        **{"enc_res2net_scale": 2, "enc_se_channels": 8, "look_ahead_layers": [0], "look_backward_layers": [0]},
        **channels,
    }
    wave = {
        **{"mel_dim": 8, "upsample_initial_channel": 16, "upsample_rates": [2, 2], "upsample_kernel_sizes": [4, 4]},
        **{"resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1, 1, 1]]},
    }
    made = hf.Qwen2_5OmniForConditionalGeneration(
        hf.Qwen2_5OmniConfig(
            thinker_config=qwen2_5_thinker_config(processor).to_dict(),
            talker_config=talker,
            token2wav_config={"dit_config": mel, "bigvgan_config": wave},
        )
    )
    made.speaker_map["Chelsie"] = {"bos_token": 1, "cond": torch.zeros(1, 8), "ref_mel": torch.zeros(1, 12, 8)}
    return made


def qwen3_omni() -> PreTrainedModel:
    """The thinker, with what speaks."""
    processor = qwen3_omni_processor()
    words = processor.tokenizer
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": WIDTH}
    # Of its last 1024 tokens, only the end may be said.
    speech = qwen_text(processor, head_dim=8, vocab_size=1024 + 32, shared_expert_intermediate_size=WIDTH, **experts)
    codes = text_settings(words, head_dim=8, vocab_size=32, num_code_groups=2)
    talker = {
        **{"text_config": speech, "code_predictor_config": codes, "num_code_groups": 2},
        **{"thinker_hidden_size": WIDTH, "accept_hidden_layer": 1, "codec_eos_token_id": 40},
        **{"codec_nothink_id": 41, "codec_think_bos_id": 42, "codec_think_eos_id": 43, "codec_pad_id": 44},
        **{"codec_bos_id": 45, "speaker_id": {"ethan": 46}, "spatial_merge_size": 2, **omni_tokens(processor)},
    }
    wave = {
        **{"codebook_size": 32, "hidden_size": WIDTH, "num_attention_heads": 4, "num_key_value_heads": 4},
        **{"intermediate_size": WIDTH, "num_hidden_layers": 1, "num_quantizers": 2, "decoder_dim": 64},
    }
    roles = {f"{role}_token_id": words.encode(role, add_special_tokens=False)[0] for role in ("user", "assistant")}
    return hf.Qwen3OmniMoeForConditionalGeneration(
        hf.Qwen3OmniMoeConfig(
            thinker_config=qwen3_thinker_config(processor).to_dict(),
            talker_config=talker,
            code2wav_config=wave,
            **roles,
            im_start_token_id=words.convert_tokens_to_ids("<|im_start|>"),
            im_end_token_id=words.convert_tokens_to_ids("<|im_end|>"),
            **{"tts_pad_token_id": 1, "tts_bos_token_id": 2, "tts_eos_token_id": 3},
        )
    )


def encode_small_videos(*arguments: Any, **settings: Any) -> dict[str, Any]:
    """:func:`encode_chat` with videos as small as pictures: these processors bring a size for them."""
    return encode_chat(*arguments, **settings, videos_kwargs={"size": SIZE})


OMNI = {**QWEN, "encode": encode_small_videos}
ENTRIES = (
    Entry("qwen2_5_omni_thinker", qwen2_5_omni_processor, qwen2_5_thinker, **OMNI),
    Entry("qwen3_omni_moe_thinker", qwen3_omni_processor, qwen3_thinker, **OMNI),
)
