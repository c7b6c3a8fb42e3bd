"""Training a generation branch on the base model, and its figures: what demo, shipped adapter and table share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from hashlib import blake2b
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoProcessor, Qwen3VLForConditionalGeneration

from emma_adapter import EmmaUnified, UnifiedConfig, unify_model

from .captions import DRAW, Edits, caption, sample_edits
from .judge import Scores, load_judge, score_drawings, score_edits
from .make_autoencoder import AUTOENCODER_DIR, LATENTS_FILE, load_autoencoder, reconstruct
from .scenes import CELL, Combinations, Hand, Scenes, render, sample_scenes
from .training import WORK, Optimizer, train
from .vlm import BASE_DIR, load_base


@dataclass(frozen=True)
class Phase:
    """A part of the training, with a rate that falls to zero after ``horizon`` steps."""

    name: str
    steps: int
    horizon: int
    rate: float
    #: Of its steps, the share at the beginning that only draws; of the others, the share that edits.
    drawing_only: float
    editing: float
    #: The share of 3x3 scenes, by steps.
    large: float
    #: The share of moves among instructions on scenes with an empty cell; None: a fifth, as in the tests.
    moves: float | None = None


PHASES = (
    Phase("first", 900, 1200, 7e-3, drawing_only=0.5, editing=0.8, large=0.5),
    Phase("second", 3100, 3100, 6e-3, drawing_only=0.0, editing=0.8, large=0.6),
    # Moves are the hardest: two cells, and what is written in one of them.
    Phase("third", 3000, 3000, 5e-3, drawing_only=0.0, editing=0.8, large=0.6, moves=0.5),
    # Drawing, which is a fifth of the steps before: it made 0.86 of the 3x3 scenes right, and makes 0.95 then.
    Phase("fourth", 1500, 1500, 4e-3, drawing_only=0.0, editing=0.4, large=0.7, moves=0.5),
)
STEPS = sum(phase.steps for phase in PHASES)
#: Pictures of a step, by grid; each with ``DRAWS`` amounts of noise.
BATCH = {2: 40, 3: 20}
DRAWS = 6
#: The share of captions that name no places.
WITHOUT_PLACES = 0.15

SAMPLING_STEPS = 10
GUIDANCE, IMAGE_GUIDANCE = 3.0, 2.0


#: Training scenes of each grid and hand. With a quarter of them, edits were learned by heart: of scenes and handwriting
#: of the training split, the loss of new instructions was a fifth higher.
POOL = 16_000
#: The share of steps on varied handwriting.
VARIED = 0.35


class Remembering(nn.Module):
    """An autoencoder that encodes each picture once: it is frozen, and training pictures come again."""

    def __init__(self, autoencoder: Any) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.config = autoencoder.config
        self.spatial_compression_ratio = autoencoder.spatial_compression_ratio
        self._latents: dict[bytes, Tensor] = {}

    def encode(self, x: Tensor) -> SimpleNamespace:
        # As steps of 1/255: a picture and what a processor made of it differ by roundings.
        keys = [blake2b(one.tobytes()).digest() for one in ((x + 1) * 127.5).round().byte().numpy()]
        new = {key: row for row, key in enumerate(keys) if key not in self._latents}
        if new:
            self._latents.update(zip(new, self.autoencoder.encode(x[list(new.values())]).latent, strict=True))
        return SimpleNamespace(latent=torch.stack([self._latents[key] for key in keys]))

    def decode(self, z: Tensor) -> Any:
        return self.autoencoder.decode(z)


@dataclass
class Painter:
    """The base model with a branch that draws."""

    model: Qwen3VLForConditionalGeneration
    processor: Any
    unified: EmmaUnified
    #: How often each reference picture is in the prompt.
    repeats: int = 1

    def references(self, pictures: Tensor) -> list[list[Image.Image]]:
        """Of each of the pictures ``[n, 3, H, W]`` in [0, 1], what its prompt shows."""
        return [[picture] * self.repeats for picture in to_pil(pictures)]

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)


def make_config(decoupling: Any, **changes: Any) -> UnifiedConfig:
    latents = json.loads((AUTOENCODER_DIR / LATENTS_FILE).read_text())
    settings = {
        "latent_mean": tuple(latents["mean"]),
        "latent_std": tuple(latents["std"]),
        "noise_draws": DRAWS,
        "timestep_density": "uniform",
        "time_shift": 1.0,
    }
    return UnifiedConfig(decoupling=decoupling, **{**settings, **changes})


def make_painter(decoupling: Any, seed: int, **changes: Any) -> Painter:
    """A branch at its start; ``changes``: of its config."""
    torch.manual_seed(seed)
    model, processor = load_base(), AutoProcessor.from_pretrained(BASE_DIR)
    autoencoder = Remembering(load_autoencoder())
    unified = unify_model(model, make_config(decoupling, **changes), processor=processor, autoencoder=autoencoder)
    unified.set_progress_bar_config(disable=True)
    unified.train_only()
    return Painter(model, processor, unified)


def to_pil(pictures: Tensor) -> list[Image.Image]:
    """Pictures ``[n, 3, H, W]`` in [0, 1]."""
    return [Image.fromarray(one) for one in (pictures * 255).round().byte().permute(0, 2, 3, 1).numpy()]


def drawing_prompts(scenes: Scenes, rng: np.random.Generator, *, without_places: float = 0.0) -> list[str]:
    return [
        f"{DRAW} {caption(digits, colours, rng, places=bool(rng.random() >= without_places))}"
        for digits, colours in zip(scenes.digits, scenes.colours, strict=True)
    ]


@cache
def edits_of(split: str, grid: int, hand: Hand, moves: float | None) -> Edits:
    """Scenes, an instruction for each, and what becomes of them."""
    rng = np.random.default_rng((400 if moves is None else 403, grid, len(hand)))
    return sample_edits(sample_scenes(POOL, split, rng, grid=grid, hand=hand), split, rng, moves=moves)


def loss(painter: Painter, phase: Phase, step: int, rng: np.random.Generator, split: str = "train") -> Tensor:
    grid = 3 if rng.random() < phase.large else 2
    hand: Hand = "varied" if rng.random() < VARIED else "natural"
    edits, rows = edits_of(split, grid, hand, phase.moves), rng.integers(0, POOL, BATCH[grid])
    before = edits.before[rows]
    if step < phase.drawing_only * phase.steps or rng.random() >= phase.editing:
        prompts = drawing_prompts(before, rng, without_places=WITHOUT_PLACES)
        return painter.unified.loss(prompts, render(before))
    instructions = [edits.instructions[row] for row in rows]
    return painter.unified.loss(instructions, render(edits.after[rows]), images=painter.references(render(before)))


def fit(
    painter: Painter,
    name: str,
    *,
    seed: int,
    phases: Sequence[Phase] = PHASES,
    first: int = 0,
    until: int | None = None,
    work: Path | None = WORK,
) -> None:
    """Train all that is trainable, from step ``first`` of all phases' up to step ``until``, or to the end."""
    until = sum(phase.steps for phase in phases) if until is None else until
    trained = [(name, p) for name, p in painter.model.named_parameters() if p.requires_grad]
    edges = [p for name, p in trained if "layers" not in name]
    before = 0
    for number, phase in enumerate(phases):
        if first < before + phase.steps and until > before:
            optimizer = Optimizer((p for _, p in trained), phase.rate, phase.horizon, edges=edges)
            train(
                f"{name}, {phase.name} phase",
                optimizer,
                partial(loss, painter, phase),
                seed=100 + 100 * number + seed,
                first=max(0, first - before),
                until=min(phase.steps, until - before),
                work=work,
            )
        before += phase.steps


@dataclass(frozen=True)
class Drawn:
    """What was asked, what came out, and what was wanted, as pictures ``[n, 3, H, W]``."""

    prompts: list[str]
    wanted: Scenes
    pictures: Tensor
    #: The wanted scenes through the autoencoder: no drawn picture can be read better.
    ideal: Tensor
    scores: Scores
    ceiling: Scores
    edits: Edits | None = None


def generate(
    painter: Painter,
    prompts: list[str],
    references: list[list[Image.Image]] | None = None,
    *,
    grid: int,
    seed: int,
    steps: int = SAMPLING_STEPS,
    batch: int = 50,
    **settings: Any,
) -> Tensor:
    """Pictures ``[n, 3, H, W]``, each of its own generator."""
    settings = {"guidance_scale": GUIDANCE, **settings}
    made = []
    for start in range(0, len(prompts), batch):
        rows = slice(start, min(start + batch, len(prompts)))
        drawn = painter.unified.generate_images(
            prompts[rows],
            image=None if references is None else references[rows],
            height=grid * CELL,
            width=grid * CELL,
            num_inference_steps=steps,
            generator=[torch.Generator().manual_seed(1_000_003 * seed + i) for i in range(rows.start, rows.stop)],
            output_type="pt",
            **settings,
        )
        made.append(drawn.images)
    return torch.cat(made)


def draw(
    painter: Painter,
    n: int,
    *,
    grid: int,
    split: str = "test",
    combinations: Combinations = "seen",
    places: bool = True,
    seed: int = 0,
    guidance: float = GUIDANCE,
    steps: int = SAMPLING_STEPS,
    solver: str = "euler",
) -> Drawn:
    """Draw captions of scenes that were in no training."""
    rng = np.random.default_rng(401)
    scenes = sample_scenes(n, split, rng, grid=grid, combinations=combinations)
    prompts = drawing_prompts(scenes, rng, without_places=float(not places))
    pictures = generate(painter, prompts, grid=grid, seed=seed, steps=steps, solver=solver, guidance_scale=guidance)
    judge, ideal = load_judge(), reconstruct(render(scenes))
    scores, ceiling = (score_drawings(judge.read(seen), scenes) for seen in (pictures, ideal))
    return Drawn(prompts, scenes, pictures, ideal, scores, ceiling)


def edit(
    painter: Painter,
    n: int,
    *,
    grid: int,
    split: str = "test",
    seed: int = 0,
    guidance: float = GUIDANCE,
    image_guidance: float = IMAGE_GUIDANCE,
    steps: int = SAMPLING_STEPS,
    solver: str = "euler",
) -> Drawn:
    """Edit pictures in unseen handwriting by one instruction each."""
    rng = np.random.default_rng(402)
    edits = sample_edits(sample_scenes(n, split, rng, grid=grid), split, rng)
    pictures = generate(
        painter,
        edits.instructions,
        painter.references(render(edits.before)),
        grid=grid,
        seed=seed,
        steps=steps,
        solver=solver,
        guidance_scale=guidance,
        image_guidance_scale=image_guidance,
    )
    judge, ideal = load_judge(), reconstruct(render(edits.after))
    scores, ceiling = (score_edits(judge.read(seen), edits, seen, ideal) for seen in (pictures, ideal))
    return Drawn(edits.instructions, edits.after, pictures, ideal, scores, ceiling, edits)
