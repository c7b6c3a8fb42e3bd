"""What tiny models of all families share."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from tests.support.tiny import PATCH, WIDTH

# Another picture then changes the logits by about 0.5; with the usual 0.02, at this width, by about 0.03.
INITIALIZER_RANGE = 0.1


def text_settings(words: PreTrainedTokenizerBase, **changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(words),
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "initializer_range": INITIALIZER_RANGE,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
        **changes,
    }


def vision_settings(image_size: int | list[int], patch_size: int | list[int] = PATCH, **changes: Any) -> dict[str, Any]:
    return {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": image_size,
        "patch_size": patch_size,
        "initializer_range": INITIALIZER_RANGE,
        **changes,
    }


def square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}
