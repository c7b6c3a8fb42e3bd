"""Errors of instruction encoders: text towers, and modules of the user's own."""

from __future__ import annotations

import torch
from torch import nn

from emma_adapter import EmmaConfig, EncoderError, load_adapter, patch_model
from tests.support import tiny

from .triggers import Bench, question, raises


class Mine(nn.Module):
    """An encoder that returns what it is told to."""

    instruction_dim = 6
    max_instruction_tokens = 8

    def __init__(self, answer=None) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, texts):
        return self.answer


def ask(bench: Bench, answer) -> None:
    bench.adapter(instruction_encoder=Mine(answer)).model(**question())


@raises(EncoderError, "instructions/encoders.py:CachedEncoder._checked", "two tensors")
def an_encoder_that_returns_one_tensor(bench: Bench) -> None:
    ask(bench, torch.ones(1, 4, 6))


@raises(EncoderError, "instructions/encoders.py:CachedEncoder._checked", "must return tokens")
def an_encoder_that_returns_another_width(bench: Bench) -> None:
    ask(bench, (torch.ones(1, 4, 7), torch.ones(1, 4)))


@raises(EncoderError, "instructions/encoders.py:CachedEncoder._checked", "must return a mask")
def an_encoder_that_returns_another_mask(bench: Bench) -> None:
    ask(bench, (torch.ones(1, 4, 6), torch.ones(1, 5)))


@raises(EncoderError, "instructions/encoders.py:CachedEncoder._checked", "declares at most")
def an_encoder_that_returns_more_tokens_than_it_declares(bench: Bench) -> None:
    ask(bench, (torch.ones(1, 9, 6), torch.ones(1, 9)))


@raises(EncoderError, "instructions/encoders.py:CachedEncoder._checked", "NaN or infinite")
def an_encoder_that_overflows(bench: Bench) -> None:
    ask(bench, (torch.full((1, 4, 6), torch.inf), torch.ones(1, 4)))


@raises(EncoderError, "instructions/encoders.py:build_encoder", "pass it again")
def loading_without_the_encoder_of_ones_own(bench: Bench) -> None:
    load_adapter(tiny.llava(), bench.saved(instruction_encoder=Mine()), processor=tiny.processor())


@raises(EncoderError, "instructions/encoders.py:check_protocol", "instruction_encoder must be")
def the_class_of_an_encoder(bench: Bench) -> None:
    patch_model(tiny.llava(), instruction_encoder=Mine)


@raises(EncoderError, "instructions/encoders.py:check_protocol", "must have an integer attribute")
def an_encoder_that_does_not_tell_its_width(bench: Bench) -> None:
    patch_model(tiny.llava(), instruction_encoder=nn.Linear(2, 2))


# ----------------------------------------------------------------------------------------- transformers


@raises(EncoderError, "instructions/text_towers.py:_load_from_transformers", "text towers of these can be used")
def a_text_tower_of_another_kind(bench: Bench) -> None:
    tiny.llava().config.text_config.save_pretrained(bench.folder)
    patch_model(tiny.llava(), instruction_encoder=str(bench.folder))


@raises(EncoderError, "instructions/text_towers.py:_load_from_transformers", "can't be loaded")
def a_text_tower_that_does_not_exist(bench: Bench) -> None:
    patch_model(tiny.llava(), instruction_encoder="/no/such/folder")


@raises(EncoderError, "instructions/text_towers.py:_load_from_transformers", "lacks")
def a_text_tower_without_some_of_its_weights(bench: Bench) -> None:
    from safetensors.torch import load_file, save_file

    path = tiny.clip_text_folder(bench.folder) / "model.safetensors"
    weights = load_file(path)
    weights.pop(next(name for name in weights if "fc1" in name))
    save_file(weights, path, metadata={"format": "pt"})
    patch_model(tiny.llava(), instruction_encoder=str(bench.folder))


@raises(EncoderError, "instructions/text_towers.py:TransformersTextTower.__init__", "no padding token")
def a_siglip_tokenizer_that_does_not_pad(bench: Bench) -> None:
    from transformers import SiglipTextConfig, SiglipTextModel

    words = tiny.tokenizer()
    words.pad_token = None
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = SiglipTextConfig(vocab_size=len(words), max_position_embeddings=16, **sizes)
    SiglipTextModel(config).save_pretrained(bench.folder)
    words.save_pretrained(bench.folder)
    patch_model(tiny.llava(), instruction_encoder=str(bench.folder))


@raises(EncoderError, "instructions/text_towers.py:_checked_layer", "doesn't exist")
def a_layer_that_a_text_tower_does_not_have(bench: Bench) -> None:
    folder = str(tiny.clip_text_folder(bench.folder))
    patch_model(tiny.llava(), EmmaConfig(instruction_layer=40), instruction_encoder=folder)


# -------------------------------------------------------------------------------------------- open_clip


def open_clip_folder(bench: Bench, **text_changes) -> str:
    """A small model as open_clip reads it from a local folder."""
    import json

    import open_clip
    from safetensors.torch import save_file

    text = {
        "context_length": 16,
        "vocab_size": 300,
        "width": 16,
        "heads": 2,
        "layers": 2,
        "hf_tokenizer_name": "on/the-hub",
        **text_changes,
    }
    vision = {"image_size": 16, "patch_size": 16, "width": 16, "head_width": 8, "layers": 1}
    config = {"embed_dim": 8, "custom_text": True, "vision_cfg": vision, "text_cfg": text}
    (bench.folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    tiny.tokenizer().save_pretrained(bench.folder)
    model = open_clip.create_model(f"local-dir:{bench.folder}", load_weights=False)
    save_file(model.state_dict(), bench.folder / "open_clip_model.safetensors")
    return f"open_clip:local-dir:{bench.folder}"


@raises(EncoderError, "instructions/text_towers.py:OpenClipTextTower.__init__", "HFTextEncoder")
def an_open_clip_model_with_a_tower_of_another_kind(bench: Bench) -> None:
    patch_model(tiny.llava(), instruction_encoder="open_clip:xlm-roberta-base-ViT-B-32:laion5b_s13b_b90k")


@raises(EncoderError, "instructions/text_towers.py:OpenClipTextTower.__init__", "open_clip can't load")
def an_open_clip_model_that_does_not_exist(bench: Bench) -> None:
    patch_model(tiny.llava(), instruction_encoder="open_clip:no-such-model:weights")


@raises(EncoderError, "instructions/text_towers.py:OpenClipTextTower.__init__", "is its embedding layer")
def the_embedding_layer_of_an_open_clip_tower(bench: Bench) -> None:
    patch_model(tiny.llava(), EmmaConfig(instruction_layer=0), instruction_encoder=open_clip_folder(bench))


@raises(EncoderError, "instructions/text_towers.py:OpenClipTextTower.__init__", "HFTextEncoder")
def an_open_clip_tower_of_another_kind(bench: Bench) -> None:
    from transformers import BertConfig, BertModel

    bert = bench.folder / "bert"
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=100, **sizes)).save_pretrained(bert)
    source = open_clip_folder(bench, hf_model_name=str(bert), hf_model_pretrained=False)
    patch_model(tiny.llava(), instruction_encoder=source)
