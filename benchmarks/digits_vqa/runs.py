"""One run: train an arm on questions about training scenes, answer questions about test scenes."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import LlavaProcessor, PreTrainedTokenizerBase

from .arms import Arm
from .questions import QUESTION_TYPES, Question, every_question_type, sample_pairs, sample_questions
from .scenes import Scenes, render, sample_scenes

IGNORE = -100


class Conversation(NamedTuple):
    """Token ids of the prompt, and of the prompt with its answer."""

    prompt: list[int]
    answered: list[int]


@dataclass(frozen=True)
class QuestionSet:
    """Questions with the pixels of their scenes, ready for batches."""

    pictures: np.ndarray  # [scenes, H, W, 3] uint8
    pixel_values: Tensor  # [scenes, 3, H, W]
    questions: list[Question]
    conversations: list[Conversation]


@dataclass(frozen=True)
class Data:
    train: QuestionSet
    test: QuestionSet
    #: Questions 2i and 2i+1 are a pair: one question on two scenes that differ in one attribute.
    pairs: QuestionSet


@dataclass
class Result:
    """The record of one run. Accuracies are shares of right answers."""

    arm: str
    parameters: int
    steps: int
    seed: int
    seconds: float
    accuracy: dict[str, float]
    mean: float
    pairs: float
    answers: list[str] = field(repr=False)

    def record(self) -> dict[str, Any]:
        return asdict(self)


def make_data(processor: LlavaProcessor, *, train_scenes: int, test_scenes: int, pairs: int, split: str) -> Data:
    train_rng = np.random.default_rng(101)
    scenes = sample_scenes(train_scenes, "train", train_rng)
    train = _question_set(processor, render(scenes), sample_questions(scenes, 4, train_rng))
    scenes, questions = ask_for_test(test_scenes, split)
    test = _question_set(processor, render(scenes), questions)
    first, second, both = ask_for_pairs(pairs, split)
    return Data(train, test, _question_set(processor, np.concatenate([render(first), render(second)]), both))


def ask_for_test(test_scenes: int, split: str) -> tuple[Scenes, list[Question]]:
    """The scenes and questions of ``Data.test``."""
    rng = np.random.default_rng(301)
    scenes = sample_scenes(test_scenes, split, rng)
    return scenes, every_question_type(scenes, rng)


def ask_for_pairs(pairs: int, split: str) -> tuple[Scenes, Scenes, list[Question]]:
    """The scenes, first and changed ones, and questions of ``Data.pairs``."""
    first, second, asked = sample_pairs(pairs, split, np.random.default_rng(302))
    both = []
    for one, other in asked:
        both += [one, Question(other.scene + len(first), other.type, other.text, other.answer)]
    return first, second, both


def _question_set(processor: LlavaProcessor, pictures: np.ndarray, questions: list[Question]) -> QuestionSet:
    pixels = processor.image_processor(list(pictures), return_tensors="pt")["pixel_values"]
    return QuestionSet(pictures, pixels, questions, conversations(processor, questions))


def conversations(processor: LlavaProcessor, questions: Sequence[Question]) -> list[Conversation]:
    """The questions by the processor's chat template, with one placeholder an image."""

    @cache
    def tokenize(text: str, answer: str) -> Conversation:
        talk: list[Any] = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
        reply = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        prompt = processor.apply_chat_template(talk, add_generation_prompt=True)
        whole = processor.apply_chat_template([*talk, reply])
        return Conversation(*(processor.tokenizer(text)["input_ids"] for text in (prompt, whole)))

    return [tokenize(q.text, q.answer) for q in questions]


def make_batch(
    tokenizer: PreTrainedTokenizerBase, data: QuestionSet, chosen: Sequence[int] | np.ndarray, *, answered: bool
) -> dict[str, Tensor]:
    """Model inputs for some questions; with ``answered``, the answers are there and supervised by labels."""
    talks = [data.conversations[i] for i in chosen]
    rows = [talk.answered if answered else talk.prompt for talk in talks]
    # As the tokenizer would, ten times as fast.
    batch = {
        "input_ids": _padded(rows, tokenizer.pad_token_id),
        "attention_mask": _padded([[1] * len(row) for row in rows], 0),
    }
    batch["pixel_values"] = data.pixel_values[[data.questions[i].scene for i in chosen]]
    if answered:
        labels = torch.full_like(batch["input_ids"], IGNORE)
        for row, talk in enumerate(talks):
            # Rows are padded on the left: the answer is the end of the row.
            reply = talk.answered[len(talk.prompt) :]
            labels[row, -len(reply) :] = torch.tensor(reply)
        batch["labels"] = labels
    return batch


def _padded(rows: list[list[int]], value: int) -> Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value, padding_side="left")


def _instruction(
    arm: Arm, data: QuestionSet, chosen: Sequence[int] | np.ndarray, rng: np.random.Generator
) -> dict[str, Any]:
    if arm.instruction_template is None:
        return {}
    asked = rng.permutation(np.asarray(chosen)) if arm.shuffle_instructions else chosen
    return {"instruction": [arm.instruction_template.format(question=data.questions[i].text) for i in asked]}


def train(arm: Arm, data: QuestionSet, processor: LlavaProcessor, *, steps: int, batch_size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(arm.parameters, lr=arm.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 20) * (0.49 * (1 + math.cos(math.pi * step / steps)) + 0.02)
    )
    progress = tqdm(range(steps), desc=arm.name, mininterval=1)
    average = None
    for _, chosen in zip(progress, _epochs(len(data.questions), batch_size, rng), strict=False):
        batch = make_batch(processor.tokenizer, data, chosen, answered=True)
        loss = arm.model(**batch, **_instruction(arm, data, chosen, rng)).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(arm.parameters, 1.0)
        optimizer.step()
        schedule.step()
        average = loss.item() if average is None else 0.97 * average + 0.03 * loss.item()
        progress.set_postfix(loss=f"{average:.3f}", refresh=False)


def _epochs(n: int, batch_size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    while True:
        order = rng.permutation(n)
        for start in range(0, n - batch_size + 1, batch_size):
            yield order[start : start + batch_size]


@torch.no_grad()
def answer(arm: Arm, data: QuestionSet, processor: LlavaProcessor, *, batch_size: int = 256) -> list[str]:
    """The first generated word to each question."""
    rng = np.random.default_rng(5)
    words: list[str] = []
    for start in range(0, len(data.questions), batch_size):
        chosen = range(start, min(start + batch_size, len(data.questions)))
        batch = make_batch(processor.tokenizer, data, chosen, answered=False)
        generated = arm.model.generate(  # type: ignore[operator]
            **batch, **_instruction(arm, data, chosen, rng), max_new_tokens=1, do_sample=False
        )
        words += processor.tokenizer.batch_decode(generated[:, -1:])
    return words


def evaluate(arm: Arm, data: Data, processor: LlavaProcessor, *, steps: int, seed: int, seconds: float) -> Result:
    answers = answer(arm, data.test, processor)
    right = [given == question.answer for given, question in zip(answers, data.test.questions, strict=True)]
    accuracy = {
        type: float(
            np.mean([ok for ok, question in zip(right, data.test.questions, strict=True) if question.type == type])
        )
        for type in QUESTION_TYPES
    }
    pair_answers = answer(arm, data.pairs, processor)
    pair_right = np.array([a == q.answer for a, q in zip(pair_answers, data.pairs.questions, strict=True)])
    return Result(
        arm=arm.name,
        parameters=arm.num_parameters,
        steps=steps if arm.parameters else 0,
        seed=seed,
        seconds=round(seconds, 1),
        accuracy=accuracy,
        mean=float(np.mean(list(accuracy.values()))),
        pairs=float(pair_right.reshape(-1, 2).all(1).mean()),
        answers=answers,
    )


def run(arm: Arm, data: Data, processor: LlavaProcessor, *, steps: int, batch_size: int, seed: int) -> Result:
    torch.manual_seed(seed)
    started = time.perf_counter()
    if arm.parameters:
        train(arm, data.train, processor, steps=steps, batch_size=batch_size, seed=seed)
    return evaluate(arm, data, processor, steps=steps, seed=seed, seconds=time.perf_counter() - started)
