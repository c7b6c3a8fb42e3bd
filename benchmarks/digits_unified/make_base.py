"""Make the shipped base model again from scratch: ``python -m benchmarks.digits_unified.make_base``.

Stage 1 trains the vision tower to read each visual token's cell. Stage 2 freezes it, and trains the language model:
first on scenes that are told in words, which is where it learns what is where; then on pictures too: captions,
questions, and saying what an instruction makes of a scene. It never draws. About half an hour.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen3VLForConditionalGeneration

from ..digits_vqa.scenes import COLOURS, DIGITS, EMPTY
from .captions import DESCRIBE, Edits, caption, question, sample_edits
from .judge import labels
from .scenes import GRIDS, Hand, Scenes, render, sample_scenes
from .training import Optimizer, train
from .vlm import BASE_DIR, TOKEN_ID, WIDTH, config, load_base, processor, to_pixel_values

VISION_STEPS = 1200
#: On told scenes alone, which are quick.
TOLD_STEPS = 1200
#: At a rate that falls slowly (it would reach zero after ``LANGUAGE_HORIZON``), then down to zero.
LANGUAGE_STEPS, LANGUAGE_HORIZON = 900, 2000
ANNEALING_STEPS = 400
#: Then mostly instructions, which take longest to learn.
EDITING_STEPS, EDITING_HORIZON = 400, 700
LAST_STEPS = 150
#: Scenes of a step, by grid.
VISION_BATCH = {2: 48, 3: 22}
LANGUAGE_BATCH = {2: 48, 3: 28}
TOLD_BATCH = {2: 48, 3: 32}

IGNORE = -100


def _scenes(step: int, batch: dict[int, int], rng: np.random.Generator) -> Scenes:
    grid = GRIDS[step % len(GRIDS)]
    hand: Hand = "varied" if rng.random() < 0.7 else "natural"
    return sample_scenes(batch[grid], "train", rng, grid=grid, hand=hand)


# ------------------------------------------------------------------------------------------ stage 1


class Probes(nn.Module):
    """Digit and colour of a cell, read off its visual token and off its DeepStack features."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(WIDTH, len(DIGITS) + 1 + len(COLOURS)) for _ in range(3))

    def forward(self, model: Qwen3VLForConditionalGeneration, pictures: Tensor) -> list[tuple[Tensor, Tensor]]:
        pixels, grid = to_pixel_values(pictures)
        seen = model.model.visual(pixels, grid_thw=grid)
        features = (seen.pooler_output, *seen.deepstack_features)
        found = []
        for head, feature in zip(self.heads, features, strict=True):
            digit, colour = head(F.normalize(feature, dim=-1) * 10).split([len(DIGITS) + 1, len(COLOURS)], -1)
            found.append((digit, colour))
        return found


def train_vision(model: Qwen3VLForConditionalGeneration, steps: int) -> None:
    torch.manual_seed(1)
    probes = Probes()

    def loss(step: int, rng: np.random.Generator) -> Tensor:
        scenes = _scenes(step, VISION_BATCH, rng)
        digits, colours = labels(scenes)
        total = torch.zeros(())
        for weight, (digit, colour) in zip((1, 0.2, 0.2), probes(model, render(scenes)), strict=True):
            digit_loss = F.cross_entropy(digit, digits, label_smoothing=0.05)
            total = total + weight * (digit_loss + F.cross_entropy(colour, colours, ignore_index=EMPTY))
        return total

    tower = model.model.visual
    edges = [tower.pos_embed.weight, *(head.weight for head in probes.heads)]
    optimizer = Optimizer([*tower.parameters(), *probes.parameters()], 3e-3, steps, edges=edges, weight_decay=0.02)
    train("vision", optimizer, loss, seed=2)
    with torch.no_grad():
        for split in ("train", "validation"):
            scenes = sample_scenes(500, split, np.random.default_rng(7))
            digits, colours = labels(scenes)
            digit, colour = probes(model, render(scenes))[0]
            right = [(digit.argmax(-1) == digits).float().mean(), (colour.argmax(-1) == colours)[colours != EMPTY]]
            print(f"cells read off visual tokens, {split}: {right[0]:.3f}, colours {right[1].float().mean():.3f}")


# ------------------------------------------------------------------------------------------ stage 2


@cache
def processor_of_training() -> Any:
    """One processor for all batches."""
    return processor()


IMAGE = {"type": "image"}


def _turn(role: str, *parts: str | dict[str, str]) -> dict[str, object]:
    content = [part if isinstance(part, dict) else {"type": "text", "text": part} for part in parts]
    return {"role": role, "content": content}


Talk = list[dict[str, object]]

#: What a conversation is about, and its share of all that are no edits.
TALKS = {"describe": 0.25, "ask": 0.35, "describe what is told": 0.15, "ask of what is told": 0.25}
#: The share of edits of scenes that are shown; the others are told.
EDITS_SHOWN = 0.75


def conversation(
    scenes: Scenes, edits: Edits, i: int, rng: np.random.Generator, *, editing: float
) -> tuple[Talk, bool]:
    """A conversation about scene ``i``, and whether it is shown. ``editing``: the share of edits."""
    if rng.random() < editing:
        shown = bool(rng.random() < EDITS_SHOWN)
        after = caption(edits.after.digits[i], edits.after.colours[i])
        told = caption(scenes.digits[i], scenes.colours[i], rng)
        asked = f"{edits.instructions[i]} then {DESCRIBE}"
        return [_turn("user", IMAGE if shown else told, asked), _turn("assistant", after)], shown
    kind = rng.choice(list(TALKS), p=list(TALKS.values()))
    shown = "told" not in kind
    return (describing if "describe" in kind else asking)(scenes, i, rng, shown=shown), shown


def told_conversation(scenes: Scenes, i: int, rng: np.random.Generator) -> Talk:
    """A conversation about scene ``i``, which is told. A description asks for the place of everything."""
    return (describing if rng.random() < 0.6 else asking)(scenes, i, rng, shown=False)


def describing(scenes: Scenes, i: int, rng: np.random.Generator, *, shown: bool) -> Talk:
    """Told cells come in random order, and are described in reading order."""
    digits, colours = scenes.digits[i], scenes.colours[i]
    context = IMAGE if shown else caption(digits, colours, rng)
    return [_turn("user", context, DESCRIBE), _turn("assistant", caption(digits, colours))]


def asking(scenes: Scenes, i: int, rng: np.random.Generator, *, shown: bool) -> Talk:
    digits, colours = scenes.digits[i], scenes.colours[i]
    context = IMAGE if shown else caption(digits, colours, rng)
    talk = []
    for number in range(4):
        asked, answer = question(digits, colours, rng)
        talk += [_turn("user", *([] if number else [context]), asked), _turn("assistant", answer)]
    return talk


def make_batch(talks: list[Talk], shown: list[bool], pictures: Tensor) -> dict[str, Tensor]:
    """Inputs of the stock model; what the assistant says, and its end, is supervised."""
    templates = processor_of_training()
    cells = pictures.shape[-1] // 32 * (pictures.shape[-2] // 32)
    texts = [templates.apply_chat_template(talk).replace("<|image_pad|>", "<|image_pad|>" * cells) for talk in talks]
    batch = templates.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    ids = batch["input_ids"]
    supervised = torch.zeros_like(ids, dtype=torch.bool)
    speaking = torch.zeros(len(ids), dtype=torch.bool)
    for column in range(1, ids.shape[1]):
        supervised[:, column] = speaking
        speaking = (speaking & (ids[:, column] != TOKEN_ID["<|im_end|>"])) | (ids[:, column] == TOKEN_ID["assistant"])
    made = {
        "input_ids": ids,
        "attention_mask": batch["attention_mask"],
        "labels": ids.masked_fill(~supervised, IGNORE),
        "mm_token_type_ids": (ids == TOKEN_ID["<|image_pad|>"]).int(),
    }
    if any(shown):
        made["pixel_values"], made["image_grid_thw"] = to_pixel_values(pictures[torch.tensor(shown)])
    return made


def train_language(model: Qwen3VLForConditionalGeneration) -> None:
    model.model.visual.requires_grad_(False)

    def of_words(batch: dict[str, Tensor]) -> Tensor:
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch, use_cache=False).logits[:, :-1]
        return F.cross_entropy(logits[labels != IGNORE], labels[labels != IGNORE], reduction="none")

    def told(step: int, rng: np.random.Generator) -> Tensor:
        scenes = _scenes(step, TOLD_BATCH, rng)
        talks = [told_conversation(scenes, i, rng) for i in range(len(scenes))]
        return of_words(make_batch(talks, [False] * len(talks), torch.empty(0, 3, 0, 0))).mean()

    def loss(step: int, rng: np.random.Generator, *, editing: float = 0.5, focal: bool = False) -> Tensor:
        scenes = _scenes(step, LANGUAGE_BATCH, rng)
        edits = sample_edits(scenes, "train", rng)
        made = [conversation(scenes, edits, i, rng, editing=editing) for i in range(len(scenes))]
        talks, shown = zip(*made, strict=True)
        each = of_words(make_batch(list(talks), list(shown), render(scenes)))
        # Of an edited scene's caption, most words are easy: the cells that stay (focal loss, arXiv 1708.02002).
        return (each * (1 - (-each.detach()).exp())).mean() if focal else each.mean()

    edges = [model.get_input_embeddings().weight, model.lm_head.weight]

    def optimizer(rate: float, steps: int) -> Optimizer:
        return Optimizer(model.parameters(), rate, steps, edges=edges, weight_decay=0.02, warm_up=60)

    train("language, told", optimizer(3e-3, TOLD_STEPS), told, seed=7)
    train("language", optimizer(3e-3, LANGUAGE_HORIZON), loss, seed=3, until=LANGUAGE_STEPS)
    train("language, annealed", optimizer(2e-3, ANNEALING_STEPS), loss, seed=4)

    def edited(step: int, rng: np.random.Generator) -> Tensor:
        return loss(step, rng, editing=0.8, focal=True)

    train("language, editing", optimizer(2.5e-3, EDITING_HORIZON), edited, seed=5, until=EDITING_STEPS)
    train("language, editing, annealed", optimizer(1.5e-3, LAST_STEPS), edited, seed=6)


# ------------------------------------------------------------------------------------------ figures


def make_inputs(asked: list[str], pictures: Tensor | None) -> dict[str, Tensor]:
    """Inputs of the stock model, by its processor: one question on each picture in [0, 1], or on none."""
    reader = processor_of_training()
    shown = [] if pictures is None else [IMAGE]
    texts = [reader.apply_chat_template([_turn("user", *shown, one)], add_generation_prompt=True) for one in asked]
    seen = {} if pictures is None else {"images": list(pictures), "do_rescale": False}
    return dict(reader(text=texts, padding=True, return_tensors="pt", **seen))


@torch.no_grad()
def say(model: Qwen3VLForConditionalGeneration, pictures: Tensor | None, asked: list[str]) -> list[str]:
    """What the stock model answers to one question on each picture."""
    inputs = make_inputs(asked, pictures)
    answers = model.generate(**inputs, max_new_tokens=60, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    return processor_of_training().tokenizer.batch_decode(answers, skip_special_tokens=True)


def _cells_right(said: list[str], wanted: list[str], cells: int) -> np.ndarray:
    """``[n, cells]``: whether a description says what is wanted of each cell."""
    pairs = [(one.split(" , "), other.split(" , ")) for one, other in zip(said, wanted, strict=True)]
    return np.array([[k < len(one) and one[k] == other[k] for k in range(cells)] for one, other in pairs])


def report(model: Qwen3VLForConditionalGeneration, n: int = 200) -> None:
    for split in ("train", "validation", "test"):
        for grid in GRIDS:
            rng = np.random.default_rng(11)
            scenes = sample_scenes(n, split, rng, grid=grid)
            edits, pictures = sample_edits(scenes, split, rng), render(scenes)
            questions = [question(scenes.digits[i], scenes.colours[i], rng) for i in range(n)]
            answers = say(model, pictures, [asked for asked, _ in questions])
            right = np.mean([given == wanted for given, (_, wanted) in zip(answers, questions, strict=True)])
            captions = say(model, pictures, [DESCRIBE] * n)
            told = [caption(scenes.digits[i], scenes.colours[i]) for i in range(n)]
            whole = np.mean([given == wanted for given, wanted in zip(captions, told, strict=True)])
            said = say(model, pictures, [f"{one} then {DESCRIBE}" for one in edits.instructions])
            after = [caption(edits.after.digits[i], edits.after.colours[i]) for i in range(n)]
            hits = _cells_right(said, after, grid * grid)
            words = [f"{caption(scenes.digits[i], scenes.colours[i], rng)} {DESCRIBE}" for i in range(n)]
            placed = _cells_right(say(model, None, words), told, grid * grid).mean()
            edited = np.array([row[changed].all() for row, changed in zip(hits, edits.changed, strict=True)])
            print(
                f"{split}, grid {grid}: questions {right:.3f}, whole captions {whole:.3f}; edits in words: "
                f"edited cell {edited.mean():.3f} (by name {edited[edits.by_name].mean():.3f}), "
                f"other cells {hits[~edits.changed].mean():.3f}; cells of told scenes {placed:.3f}",
                flush=True,
            )


@click.command(help=__doc__)
@click.option("--output", type=click.Path(path_type=Path), default=BASE_DIR, show_default=True)
def main(output: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(config())
    train_vision(model, VISION_STEPS)
    train_language(model)
    # Half precision halves the shipped file; what is measured is what it holds.
    model.half().save_pretrained(output)
    processor().save_pretrained(output)
    report(load_base(output))


if __name__ == "__main__":
    main()
