"""The folder that the documentation's examples run in: tiny models under their hub names, and a small dataset."""

from __future__ import annotations

import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, CLIPImageProcessor

from emma_adapter import UnifiedConfig, unify_model
from tests.support import deepseek, remote_internvl, remote_llava, tiny
from tests.support.zoo import ZOO, florence2, mllama, nemotron_h_omni, phi4_multimodal, qwen_omni

MODEL_ID = "llava-hf/llava-1.5-7b-hf"
CLIP_ID = "openai/clip-vit-large-patch14-336"
AUTOENCODER_ID = "mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers"
#: Of models of ``tests/support/zoo/``, under the names of checkpoints that people use.
ZOO_IDS = {
    "llava-hf/vip-llava-7b-hf": "vipllava",
    "mistral-community/pixtral-12b": "llava_pixtral",
    "llava-hf/llava-v1.6-mistral-7b-hf": "llava_next",
    "llava-hf/LLaVA-NeXT-Video-7B-hf": "llava_next_video",
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": "llava_onevision",
    "Qwen/Qwen2-VL-7B-Instruct": "qwen2_vl",
    "Qwen/Qwen2.5-VL-7B-Instruct": "qwen2_5_vl",
    "Qwen/Qwen3-VL-8B-Instruct": "qwen3_vl",
    "Qwen/Qwen3.5-9B": "qwen3_5",
    "Qwen/Qwen3-VL-30B-A3B-Instruct": "qwen3_vl_moe",
    "Qwen/Qwen2.5-Omni-7B": "qwen2_5_omni_thinker",
    "moonshotai/Kimi-K2.6": "kimi_k25",
    "openbmb/MiniCPM-V-4.6": "minicpmv4_6",
    "LiquidAI/LFM2-VL-1.6B": "lfm2_vl",
    "OpenGVLab/InternVL3-8B-hf": "internvl",
    "google/gemma-3-4b-it": "gemma3",
    "google/gemma-3n-E4B-it": "gemma3n",
    "google/gemma-4-E4B-it": "gemma4",
    "CohereLabs/command-a-vision-07-2025": "cohere2_vision",
    "zai-org/GLM-4.1V-9B-Thinking": "glm4v",
    "google/paligemma2-3b-mix-224": "paligemma",
    "HuggingFaceM4/Idefics3-8B-Llama3": "idefics3",
    "allenai/Molmo2-8B": "molmo2",
    "thisisiron/Ovis2-2B-hf": "ovis2",
    "mistralai/Mistral-Small-3.1-24B-Instruct-2503": "mistral3",
}
_QUESTIONS = [
    ("How many dogs are there?", "two"),
    ("What colour is the bird?", "red"),
    ("Is there a cat in the picture?", "no"),
    ("What colour is the tree?", "green"),
]


def make_workspace(folder: Path, text: str = MODEL_ID) -> Path:
    """The models that ``text`` names, with their processors; ``train.jsonl`` and ``drawings.jsonl``, with
    pictures in ``images/``; ``birds/``,
    pictures with ``questions.jsonl``; ``wide.png``, ``tall.png``, and ``clip.npy``, the frames of a video."""
    for name, save in _saves().items():
        if name in text:
            save(folder / name)
    (folder / "images").mkdir()
    rows = []
    for number, (question, answer) in enumerate(_QUESTIONS * 2):
        tiny.picture(number).save(folder / "images" / f"{number}.png")
        messages = [tiny.user(question), tiny.assistant(answer)]
        rows.append({"images": [f"images/{number}.png"], "messages": messages})
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawings = [{"prompt": f"a {number}", "target": f"images/{number}.png"} for number in range(4)]
    drawings.append({"prompt": "make it a 1", "image": "images/0.png", "target": "images/1.png"})
    (folder / "drawings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in drawings))
    tiny.picture(0).resize((84, 28)).save(folder / "wide.png")
    tiny.picture(1).resize((28, 56)).save(folder / "tall.png")
    np.save(folder / "clip.npy", np.stack([np.asarray(tiny.picture(number).resize((84, 56))) for number in range(4)]))
    (folder / "birds").mkdir()
    questions = []
    for number in range(4):
        tiny.picture(number).save(folder / "birds" / f"{number}.png")
        for question, answer in _QUESTIONS[:2]:
            attribute = "colour" if "colour" in question else "count"
            row = {"image": f"{number}.png", "question": question, "answer": answer, "attribute": attribute}
            questions.append(row)
    (folder / "birds" / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    return folder


def make_drawing_workspace(folder: Path, model_id: str) -> Any:
    """A workspace with ``drawing/``, a branch that was trained with an autoencoder by name; the model that has it."""
    make_workspace(folder, f"{model_id} {AUTOENCODER_ID}")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        model = AutoModelForImageTextToText.from_pretrained(model_id)
        processor = AutoProcessor.from_pretrained(model_id)
        made = unify_model(model, UnifiedConfig(decoupling=2), processor=processor, autoencoder=AUTOENCODER_ID)
        tiny.train_randomly(model.emma_unified, 0.05)
        made.save_pretrained("drawing")
    return model


def _saves() -> dict[str, Callable[[Path], None]]:
    saves = {
        MODEL_ID: _save_llava,
        CLIP_ID: tiny.clip_text_folder,
        AUTOENCODER_ID: _save_autoencoder,
        "MoDA-LLaVA-MoRE-8B-CLIP": _save_moda,
        "deepseek-community/deepseek-vl-1.3b-chat": _save_deepseek,
        "OpenGVLab/InternVL2_5-8B": _save_internvl_chat,
        "Qwen/Qwen3-Omni-30B-A3B-Instruct": _save_qwen3_omni,
        "florence-community/Florence-2-base-ft": lambda folder: _save_entry(florence2.ENTRY, folder),
        "microsoft/Phi-4-multimodal-instruct": lambda folder: _save_entry(phi4_multimodal.ENTRY, folder),
        "nvidia/Nemotron-3-Nano-Omni-30B-A3B-Reasoning-BF16": lambda folder: _save_entry(nemotron_h_omni.ENTRY, folder),
        "meta-llama/Llama-3.2-11B-Vision-Instruct": lambda folder: _save_entry(mllama.ENTRY, folder),
    }
    return saves | {
        name: lambda folder, entry=ZOO[entry]: _save_entry(entry, folder) for name, entry in ZOO_IDS.items()
    }


def _save_llava(folder: Path) -> None:
    tiny.llava().save_pretrained(folder)
    tiny.processor().save_pretrained(folder)


def _save_moda(folder: Path) -> None:
    """A language model's checkpoint with MoDA's module in it, as its authors' LLaVA writes it."""
    layer = torch.nn.TransformerDecoderLayer(tiny.WIDTH, 16, 8, activation="gelu", batch_first=True)
    decoder = torch.nn.TransformerDecoder(layer, 2)
    tensors = {f"model.moda.decoder.{name}": value for name, value in decoder.state_dict().items()}
    tensors |= {"model.moda.mask_head.weight": torch.eye(tiny.WIDTH), "lm_head.weight": torch.zeros(2, tiny.WIDTH)}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")


def _save_autoencoder(folder: Path) -> None:
    from tests.unified.small import autoencoder

    autoencoder().save_pretrained(folder)


def _save_entry(entry: Any, folder: Path) -> None:
    entry.model().save_pretrained(folder)
    entry.processor().save_pretrained(folder)


def _save_deepseek(folder: Path) -> None:
    deepseek.deepseek_vl().save_pretrained(folder)
    deepseek.deepseek_processor().save_pretrained(folder)


def _save_qwen3_omni(folder: Path) -> None:
    qwen_omni.qwen3_omni().save_pretrained(folder)
    qwen_omni.qwen3_omni_processor().save_pretrained(folder)


def _save_internvl_chat(folder: Path) -> None:
    # In place of the code that comes with the checkpoint.
    AutoConfig.register("internvl_chat", remote_internvl.InternVLChatConfig, exist_ok=True)
    AutoModel.register(remote_internvl.InternVLChatConfig, remote_internvl.InternVLChatModel, exist_ok=True)
    remote_internvl.internvl_chat(set_context_token=False).save_pretrained(folder)
    remote_internvl.internvl_tokenizer().save_pretrained(folder)


def llava_package() -> dict[str, types.ModuleType]:
    """What the examples import of LLaVA's own package, ``llava``: functions of its names around the tiny model."""

    def load_pretrained_model(model_path: str, model_base: None, model_name: str) -> tuple[Any, Any, Any, int]:
        size = {"height": remote_llava.SIDE, "width": remote_llava.SIDE}
        words = tiny.tokenizer()
        model = remote_llava.llava_original(vocab_size=len(words))
        return words, model, CLIPImageProcessor(size=size, crop_size=size), 2048

    def process_images(images: list[Image.Image], image_processor: Any, model_config: Any) -> torch.Tensor:
        return image_processor(images, return_tensors="pt")["pixel_values"]

    def tokenizer_image_token(prompt: str, tokenizer: Any, *, return_tensors: str) -> torch.Tensor:
        before, after = (tokenizer(part)["input_ids"] for part in prompt.split("<image>"))
        return torch.tensor([*before, remote_llava.IMAGE_TOKEN_INDEX, *after[1:]])

    package, model, builder, tools = (
        types.ModuleType(name) for name in ("llava", "llava.model", "llava.model.builder", "llava.mm_utils")
    )
    builder.load_pretrained_model = load_pretrained_model  # type: ignore[attr-defined]
    tools.process_images = process_images  # type: ignore[attr-defined]
    tools.tokenizer_image_token = tokenizer_image_token  # type: ignore[attr-defined]
    return {made.__name__: made for made in (package, model, builder, tools)}
