"""Florence-2: an encoder-decoder, which reads one picture in each row.

It is not part of ``ZOO``, whose tests read logits of the prompt's tokens: ``tests/patching/test_florence2.py`` holds it
to the contract.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import transformers as hf
from transformers import PreTrainedModel, ProcessorMixin

from tests.support.tiny import WIDTH

from .entry import Entry
from .rows import Row
from .settings import INITIALIZER_RANGE, square
from .text import tokenizer

IMAGE_SIZE = 128
GRID = (4, 4)


def florence2_processor() -> hf.Florence2Processor:
    return hf.Florence2Processor(
        image_processor=hf.CLIPImageProcessor(
            size=square(IMAGE_SIZE), do_center_crop=False, image_seq_length=1 + GRID[0] * GRID[1]
        ),
        tokenizer=tokenizer(bos="<s>", eos="</s>", pad="<pad>", names={"image_token": "<image>"}),
    )


def florence2_model(processor: ProcessorMixin) -> PreTrainedModel:
    words = processor.tokenizer
    return hf.Florence2ForConditionalGeneration(
        hf.Florence2Config(
            vision_config=hf.Florence2VisionConfig(
                depths=(1, 1, 1, 1),
                embed_dim=(8, 8, 16, 16),
                num_heads=(2, 2, 2, 2),
                num_groups=(2, 2, 2, 2),
                window_size=2,
                drop_path_rate=0.0,
                projection_dim=WIDTH,
                initializer_range=INITIALIZER_RANGE,
            ),
            text_config=hf.BartConfig(
                vocab_size=len(words),
                d_model=WIDTH,
                encoder_layers=2,
                decoder_layers=2,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=2 * WIDTH,
                decoder_ffn_dim=2 * WIDTH,
                init_std=INITIALIZER_RANGE,
                bos_token_id=words.bos_token_id,
                eos_token_id=words.eos_token_id,
                pad_token_id=words.pad_token_id,
                decoder_start_token_id=words.eos_token_id,
                forced_eos_token_id=None,
            ),
            image_token_id=words.image_token_id,
        )
    )


def encode_question(
    processor: ProcessorMixin, rows: Sequence[Row], answer: str | None, *, generate: bool, padding_side: str
) -> dict[str, Any]:
    """The last question of each row with its picture; the answer, if there is one, is no part of it."""
    made = processor(
        text=[row.turns[-1] for row in rows],
        images=[picture for row in rows for picture in row.pictures()],
        padding=True,
        padding_side=padding_side,
        return_tensors="pt",
    )
    return dict(made)


ENTRY = Entry("florence2", florence2_processor, florence2_model, encode=encode_question)
