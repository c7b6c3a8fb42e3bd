"""Make the shipped base model again from scratch: ``python -m benchmarks.digits_vqa.pretrain``.

Stage 1 trains vision and text tower together, contrastively, as CLIP is trained. Stage 2 freezes the vision
tower and trains projector and language model on captions and multi-turn questions. Step counts and seeds are
fixed; it takes ten to fifteen minutes. Only training scans are used. (The ablation makes further checkpoints, with
other seeds and other pooling.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPConfig, CLIPModel, CLIPTextModel

from . import language
from .pooled_llava import PooledLlava
from .questions import ask_any, caption
from .scenes import CELLS, COLOURS, DIGITS, EMPTY, GRID, POSITIONS, Scenes, render, sample_scenes
from .vlm import (
    BASE_DIR,
    llava_config,
    processor,
    text_tower_config,
    to_pixel_values,
    vision_config,
    word_tokenizer,
)

CONTRASTIVE_STEPS = 600
CONTRASTIVE_BATCH = 160
LANGUAGE_STEPS = 2000
_EMPTY_PROMPT = len(DIGITS) * len(COLOURS)
_POSITION_PHRASES = ("at the {}", "what digit is at the {} ?", "what colour is the digit at the {} ?")
_OBJECT_PHRASES = (
    "{}",
    "{}",
    "is there a {} ?",
    "what digit is above the {} ?",
    "what digit is below the {} ?",
    "what digit is left of the {} ?",
    "what digit is right of the {} ?",
)


def cosine(step: int, steps: int, warmup: int, floor: float) -> float:
    return min(1, (step + 1) / warmup) * (0.5 * (1 + math.cos(math.pi * step / steps)) * (1 - floor) + floor)


# ------------------------------------------------------------------------------------------ stage 1


def _phrases(rng: np.random.Generator) -> list[str]:
    """40 coloured digits, "empty", 4 positions: each in a random wording."""
    objects = [
        _OBJECT_PHRASES[rng.integers(len(_OBJECT_PHRASES))].format(f"{colour} {digit}")
        for digit in DIGITS
        for colour in COLOURS
    ]
    positions = [_POSITION_PHRASES[rng.integers(len(_POSITION_PHRASES))].format(position) for position in POSITIONS]
    return [*objects, "empty", *positions]


def _region_labels(scenes: Scenes) -> Tensor:
    labels = np.where(scenes.digits == EMPTY, _EMPTY_PROMPT, scenes.digits * len(COLOURS) + scenes.colours)
    return torch.as_tensor(labels)


def _describe(scenes: Scenes, i: int, rng: np.random.Generator) -> str:
    digits, colours = scenes.digits[i], scenes.colours[i]
    if rng.random() < 0.4:
        return caption(digits, colours)
    turns = [ask_any(digits, colours, rng) for _ in range(2)]
    return " ".join(f"{question} {answer}" for _, question, answer in turns)


class Contrastive(nn.Module):
    """CLIP with embeddings of the four regions beside that of the whole image."""

    def __init__(self) -> None:
        super().__init__()
        self.clip = CLIPModel(
            CLIPConfig(
                text_config=text_tower_config().to_dict(), vision_config=vision_config().to_dict(), projection_dim=64
            )
        )
        nn.init.normal_(self.clip.vision_model.embeddings.patch_embedding.weight, std=0.05)
        self.tokenizer = word_tokenizer(for_text_tower=True)

    def text(self, texts: list[str]) -> Tensor:
        ids = self.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        pooled = self.clip.text_model(input_ids=ids).pooler_output
        return F.normalize(self.clip.text_projection(pooled), dim=-1)

    def image(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Regions ``[B, CELLS, 64]`` and whole images ``[B, 64]``, unit length."""
        out = self.clip.vision_model(pixel_values=pixel_values)
        patches = out.last_hidden_state[:, 1:]
        side = math.isqrt(patches.shape[1]) // GRID
        cells = rearrange(patches, "b (r h c w) d -> b (r c) (h w) d", r=GRID, c=GRID, h=side, w=side).mean(2)
        regions = self.clip.visual_projection(self.clip.vision_model.post_layernorm(cells))
        return F.normalize(regions, dim=-1), F.normalize(self.clip.visual_projection(out.pooler_output), dim=-1)


@torch.no_grad()
def region_accuracy(model: Contrastive, split: str, n: int = 500) -> float:
    scenes = sample_scenes(n, split, np.random.default_rng(7))
    prompts = [f"{colour} {digit}" for digit in DIGITS for colour in COLOURS] + ["empty"]
    regions, _ = model.image(to_pixel_values(render(scenes)))
    predicted = (regions @ model.text(prompts).T).argmax(-1)
    labels = _region_labels(scenes)
    return (predicted == labels)[labels != _EMPTY_PROMPT].float().mean().item()


def train_towers(steps: int, seed: int = 0) -> CLIPModel:
    torch.manual_seed(seed)
    rng = np.random.default_rng(1 + 1000 * seed)
    model = Contrastive()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.02)
    pairs = torch.arange(CONTRASTIVE_BATCH)
    progress = tqdm(range(steps), desc="towers", mininterval=5)
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * cosine(step, steps, 60, 0.05)
        scenes = sample_scenes(CONTRASTIVE_BATCH, "train", rng)
        phrases = _phrases(rng)
        texts = model.text(phrases + [_describe(scenes, i, rng) for i in range(len(scenes))])
        objects, positions, captions = texts.split([_EMPTY_PROMPT + 1, CELLS, CONTRASTIVE_BATCH])
        regions, images = model.image(to_pixel_values(render(scenes)))
        scale = model.clip.logit_scale.exp().clamp(max=60)
        object_loss = F.cross_entropy((scale * regions @ objects.T).flatten(0, 1), _region_labels(scenes).flatten())
        where = torch.arange(CELLS).repeat(CONTRASTIVE_BATCH)
        position_loss = F.cross_entropy((scale * regions @ positions.T).flatten(0, 1), where)
        logits = scale * images @ captions.T
        image_loss = (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2
        loss = object_loss + 0.3 * position_loss + 0.3 * image_loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 49:
            progress.set_postfix(region=f"{object_loss.item():.3f}", image=f"{image_loss.item():.3f}", refresh=False)
    for split in ("train", "validation"):
        print(f"coloured digit of a region, {split} scans: {region_accuracy(model, split):.3f}")
    return model.clip.eval()


# ------------------------------------------------------------------------------------------ stage 2


def untrained(vision_tower: Mapping[str, Tensor], pooling: str = "1", language_layers: int = 2) -> PooledLlava:
    """A model with this CLIP vision model's state, frozen, and a projector and language model that know nothing."""
    model = PooledLlava(llava_config(pooling, language_layers))
    model.model.vision_tower.load_state_dict(
        {key.removeprefix("vision_model."): value for key, value in vision_tower.items()}
    )
    model.model.vision_tower.requires_grad_(False)
    return model


def train_language(
    vision_tower: Mapping[str, Tensor],
    steps: int,
    *,
    seed: int = 0,
    pooling: str = "1",
    start: Mapping[str, Tensor] | None = None,
) -> PooledLlava:
    """``vision_tower``: the state of a CLIP vision model; ``start``: that of a model whose training goes on."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(2 + 1000 * seed)
    model = untrained(vision_tower, pooling)
    if start is not None:
        model.load_state_dict(start)
    scenes = sample_scenes(language.SCENES, "train", rng)
    tokens = language.visual_tokens(model, scenes)

    trained = [p for p in model.parameters() if p.requires_grad]
    embedding = model.get_input_embeddings().weight
    matrices = [p for p in trained if p.ndim == 2 and p is not embedding]
    others = [p for p in trained if p.ndim != 2 or p is embedding]
    rate = 3e-3
    optimizers = [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, weight_decay=0.0, betas=(0.9, 0.98)),
    ]
    average = None
    progress = tqdm(range(steps), desc="language model", mininterval=5)
    for step in progress:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * cosine(step, steps, 80, 0.02)
        loss = language.loss(model, tokens, scenes, rng.integers(0, len(scenes), language.BATCH), rng)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        if step % 50 == 49:
            progress.set_postfix(loss=f"{average:.3f}", refresh=False)
    accuracy = language.answer_accuracy(model.eval(), "validation")
    print(f"validation accuracy: {accuracy}, mean {np.mean(list(accuracy.values())):.3f}")
    return model


def save_base(model: PooledLlava, text_tower: CLIPTextModel, output: Path) -> None:
    # Half precision halves the shipped file.
    model.half().save_pretrained(output)
    processor().save_pretrained(output)
    text_tower.half().save_pretrained(output / "text_tower")
    word_tokenizer(for_text_tower=True).save_pretrained(output / "text_tower")


@click.command(help=__doc__)
@click.option("--output", type=click.Path(path_type=Path), default=BASE_DIR, show_default=True)
@click.option("--contrastive-steps", default=CONTRASTIVE_STEPS, show_default=True)
@click.option("--language-steps", default=LANGUAGE_STEPS, show_default=True)
def main(output: Path, contrastive_steps: int, language_steps: int) -> None:
    # At this width one thread is faster than two.
    torch.set_num_threads(1)
    clip = train_towers(contrastive_steps)
    save_base(train_language(clip.vision_model.state_dict(), language_steps), clip.text_model, output)


if __name__ == "__main__":
    main()
