"""What projector and language model of a base model learn from: captions, and conversations of several turns, about
scenes of the training handwriting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .pooled_llava import PooledLlava
from .questions import QUESTION_TYPES, ask, ask_any, caption
from .scenes import Scenes, render, sample_scenes
from .vlm import BOS, EOS, IMAGE, PAD, TOKEN_ID, to_pixel_values

BATCH = 64
SCENES = 24_000

IGNORE = -100


@torch.no_grad()
def visual_tokens(model: PooledLlava, scenes: Scenes, batch: int = 500) -> Tensor:
    """What the vision tower, which is frozen, says of each scene: ``[scenes, N, D]``."""
    pixels = to_pixel_values(render(scenes))
    tokens = [
        model.model.vision_tower(pixel_values=chunk, output_hidden_states=True).hidden_states[-2][:, 1:]
        for chunk in pixels.split(batch)
    ]
    return torch.cat(tokens)


def loss(model: PooledLlava, tokens: Tensor, scenes: Scenes, chosen: np.ndarray, rng: np.random.Generator) -> Tensor:
    """Of a conversation about each of the chosen scenes, drawn by ``rng``; ``tokens [scenes, N, D]`` are of all."""
    pooled_tokens = model.config.image_seq_length
    talks = [_conversation(scenes.digits[i], scenes.colours[i], rng, pooled_tokens) for i in chosen]
    return loss_of_conversations(model, tokens[chosen], talks)


def loss_of_conversations(model: PooledLlava, tokens: Tensor, talks: Sequence[tuple[list[int], list[int]]]) -> Tensor:
    """Of the token ids and labels of a conversation about each picture, with visual tokens ``tokens [B, N, D]``."""
    ids = _padded([ids for ids, _ in talks], PAD)
    targets = _padded([labels for _, labels in talks], IGNORE)[:, 1:]
    hidden = model.model.language_model(inputs_embeds=_embed(model, tokens, ids)).last_hidden_state
    supervised = targets != IGNORE
    return F.cross_entropy(model.lm_head(hidden[:, :-1][supervised]), targets[supervised])


@torch.no_grad()
def answer_accuracy(model: PooledLlava, split: str, n: int = 400) -> dict[str, float]:
    """By type of question, one of each about ``n`` scenes."""
    rng = np.random.default_rng(11)
    scenes = sample_scenes(n, split, rng)
    tokens = visual_tokens(model, scenes)
    placeholders = [IMAGE] * model.config.image_seq_length
    accuracy = {}
    for type in QUESTION_TYPES:
        asked = [(i, ask(type, scenes.digits[i], scenes.colours[i], rng)) for i in range(n)]
        answered = [(i, *question) for i, question in asked if question is not None]
        prompts = [
            [BOS, *_words("USER:"), *placeholders, *_words(text), *_words("ASSISTANT:")] for _, text, _ in answered
        ]
        ends = torch.tensor([len(prompt) - 1 for prompt in prompts])
        embedded = _embed(model, tokens[[i for i, *_ in answered]], _padded(prompts, PAD))
        hidden = model.model.language_model(inputs_embeds=embedded).last_hidden_state
        said = model.lm_head(hidden[torch.arange(len(prompts)), ends]).argmax(-1)
        right = said == torch.tensor([TOKEN_ID[answer] for *_, answer in answered])
        accuracy[type] = round(right.float().mean().item(), 3)
    return accuracy


def _words(text: str, token_id: Mapping[str, int] = TOKEN_ID) -> list[int]:
    return [token_id[word] for word in text.split()]


def _conversation(
    digits: np.ndarray, colours: np.ndarray, rng: np.random.Generator, pooled_tokens: int
) -> tuple[list[int], list[int]]:
    """Token ids and labels of four turns about one scene, or of its caption."""
    turns = (
        [("", caption(digits, colours))]
        if rng.random() < 0.15
        else [ask_any(digits, colours, rng)[1:] for _ in range(4)]
    )
    return conversation(turns, pooled_tokens, TOKEN_ID)


def conversation(
    turns: Sequence[tuple[str, str]], pooled_tokens: int, token_id: Mapping[str, int]
) -> tuple[list[int], list[int]]:
    """Token ids and labels of questions and answers about an image; a caption answers an empty question."""
    user, assistant = _words("USER:", token_id), _words("ASSISTANT:", token_id)
    ids = [BOS, *user, *[IMAGE] * pooled_tokens]
    labels = [IGNORE] * len(ids)
    for number, (question, answer) in enumerate(turns):
        prompt = (user if number else []) + _words(question, token_id) + assistant
        reply = [*_words(answer, token_id), EOS]
        ids += prompt + reply
        labels += [IGNORE] * len(prompt) + reply
    return ids, labels


def _padded(rows: list[list[int]], value: int) -> Tensor:
    # On the right, where causal attention hides it from what comes before.
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def _embed(model: PooledLlava, tokens: Tensor, ids: Tensor) -> Tensor:
    """Input embeddings with the image placeholders, from position 2 on, replaced by the projected image."""
    embeddings = model.get_input_embeddings()(ids)
    image = model.model.multi_modal_projector(tokens)
    return torch.cat([embeddings[:, :2], image, embeddings[:, 2 + image.shape[1] :]], dim=1)
