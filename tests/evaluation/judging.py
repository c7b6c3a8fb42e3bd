"""Folders of tiny judges of the real classes."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessor,
    Owlv2Processor,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from tests.support import tiny

_SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def detector(folder: Path) -> str:
    torch.manual_seed(0)
    words = tiny.tokenizer()
    text = {**_SIZES, "vocab_size": len(words), "max_position_embeddings": 32, "pad_token_id": words.pad_token_id}
    config = Owlv2Config(
        text_config=text, vision_config={**_SIZES, "image_size": 32, "patch_size": 16}, projection_dim=16
    )
    Owlv2ForObjectDetection(config).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    Owlv2Processor(image_processor=Owlv2ImageProcessor(size=size), tokenizer=words).save_pretrained(folder)
    return str(folder)


def clip(folder: Path) -> str:
    torch.manual_seed(0)
    words = tiny.tokenizer()
    text = {**_SIZES, "vocab_size": len(words), "max_position_embeddings": 64, "eos_token_id": words.eos_token_id}
    config = CLIPConfig(
        text_config=text, vision_config={**_SIZES, "image_size": 32, "patch_size": 16}, projection_dim=16
    )
    CLIPModel(config).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    pictures = CLIPImageProcessor(size=size, crop_size=size)
    CLIPProcessor(image_processor=pictures, tokenizer=words).save_pretrained(folder)
    return str(folder)


def vit(folder: Path, width: int = 16) -> str:
    torch.manual_seed(0)
    ViTModel(ViTConfig(**{**_SIZES, "hidden_size": width}, image_size=32, patch_size=16)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)
