"""Tiny models of the real transformers classes, with real processors and tokenizers, made on the spot."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PixtralVisionConfig,
    PreTrainedTokenizerFast,
)

from emma_adapter import EmmaConfig, Fusion

PATCH = 14
GRID = 2
TOKENS_PER_IMAGE = GRID * GRID
IMAGE_SIZE = PATCH * GRID
WIDTH = 32

_CORPUS = [
    "USER: what is in the picture? ASSISTANT: a red bird on a green tree.",
    "how many dogs are there, and what colour is the left one?",
    "A chat between a curious human and an artificial intelligence assistant.",
    "describe the image in detail. is there a cat? yes, no, two, three.",
]
#: What llava-hf/llava-1.5-7b-hf writes, to the last space: nothing ends an answer.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message.role != 'system' %}{{ message.role | upper }}: {% endif %}"
    "{% for part in message.content if part.type == 'image' %}<image>\n{% endfor %}"
    "{% for part in message.content if part.type == 'text' %}"
    "{% if message.role == 'assistant' %}{% generation %}{{ part.text }} {% endgeneration %}"
    "{% else %}{{ part.text }} {% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@cache
def _byte_level_bpe(vocab_size: int, special_tokens: tuple[str, ...]) -> str:
    """A byte-level BPE trained on a few sentences, as JSON."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(
        _CORPUS,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(special_tokens),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return made.to_str()


def tokenizer() -> PreTrainedTokenizerFast:
    made = Tokenizer.from_str(_byte_level_bpe(380, ("<unk>", "<s>", "</s>", "<pad>", "<image>")))
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        extra_special_tokens={"image_token": "<image>"},
    )


def processor() -> LlavaProcessor:
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(size=size, crop_size=size),
        tokenizer=tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def llama_config(vocab_size: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )


def vision_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        projection_dim=WIDTH,
    )


def llava(*, vocab_size: int | None = None, image_token: int | None = None, seed: int = 0, **changes: Any):
    """A ``LlavaForConditionalGeneration`` in eval mode, for :func:`processor`'s tokenizer."""
    torch.manual_seed(seed)
    words = tokenizer()
    settings: dict[str, Any] = {
        "vision_config": vision_config(),
        "text_config": llama_config(vocab_size or len(words)),
        "image_token_index": words.convert_tokens_to_ids("<image>") if image_token is None else image_token,
        "image_seq_length": TOKENS_PER_IMAGE,
    }
    return LlavaForConditionalGeneration(LlavaConfig(**{**settings, **changes})).eval()


def pixtral_llava() -> LlavaForConditionalGeneration:
    vision = PixtralVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=112,
        patch_size=PATCH,
    )
    return llava(vision_config=vision, vision_feature_layer=-1, vision_feature_select_strategy="full")


def picture(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def user(text: str, images: int = 1) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def chat_inputs(
    conversations: list[list[dict[str, Any]]], *, generate: bool = True, first_picture: int = 0
) -> dict[str, Tensor]:
    """Processor output for a batch of conversations; pictures are numbered on in the order they appear."""
    made = processor()
    texts = [made.apply_chat_template(talk, add_generation_prompt=generate) for talk in conversations]
    count = sum(text.count("<image>") for text in texts)
    images = [picture(first_picture + i) for i in range(count)] or None
    return dict(made(text=texts, images=images, padding=True, return_tensors="pt"))


def token_inputs(
    images_per_row: list[int], *, image_token: int = 4, padding_side: str = "left", seed: int = 0
) -> dict[str, Tensor]:
    """A batch made of token ids, without a tokenizer: each row its own words and number of images."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number, images in enumerate(images_per_row):
        row = [1, 10 + number]
        for _ in range(images):
            row += [image_token] * TOKENS_PER_IMAGE + [20 + number]
        rows.append([*row, 30 + number, 40 + number, *([50] * (number % 3))])
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), 3)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        where = slice(longest - len(row), longest) if padding_side == "left" else slice(0, len(row))
        ids[i, where] = torch.tensor(row)
        mask[i, where] = 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    if total := sum(images_per_row):
        inputs["pixel_values"] = torch.randn(total, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    return inputs


def select_row(inputs: dict[str, Tensor], images_per_row: list[int], row: int) -> dict[str, Tensor]:
    """One row of :func:`token_inputs` as a batch of its own, without padding."""
    keep = inputs["attention_mask"][row].bool()
    alone = {name: inputs[name][row : row + 1, keep] for name in ("input_ids", "attention_mask")}
    first = sum(images_per_row[:row])
    if images_per_row[row]:
        alone["pixel_values"] = inputs["pixel_values"][first : first + images_per_row[row]]
    return alone


class BufferedFusion(Fusion):
    """A fusion as a user may write one, with a buffer beside its parameter."""

    def __init__(self, config: EmmaConfig) -> None:
        super().__init__(config)
        self.shift = nn.Parameter(torch.zeros(config.visual_dim))
        self.register_buffer("scale", torch.ones(config.visual_dim))

    def forward(self, visual_tokens, instruction_tokens, instruction_mask, grid=None):
        return visual_tokens * self.scale + self.shift


def image_features(output: Any) -> Tensor:
    """What the projector made of a call's images, ``[images * N, D]``.

    transformers 5.24 has it elsewhere, one tensor an image."""
    outputs = getattr(output, "image_outputs", None)
    features = output.image_hidden_states if outputs is None else outputs.pooler_output
    return (features if isinstance(features, Tensor) else torch.cat(tuple(features))).flatten(0, -2)


def train_randomly(module: nn.Module, scale: float = 0.5, seed: int = 0) -> None:
    """Give every parameter a value that a trained adapter could have: none is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.add_(noise.to(parameter.device, parameter.dtype))


def clip_text_folder(folder: Path, *, width: int = 24, layers: int = 3, context: int = 16) -> Path:
    """A CLIP text checkpoint as it lies in a local folder: weights, config and tokenizer."""
    torch.manual_seed(5)
    words = Tokenizer.from_str(_byte_level_bpe(300, ("<unk>", "<start>", "<end>")))
    words.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 2)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="<unk>",
        bos_token="<start>",
        eos_token="<end>",
        pad_token="<end>",
        model_max_length=context,
    )
    config = CLIPTextConfig(
        vocab_size=len(fast),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=context,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    CLIPTextModel(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder
