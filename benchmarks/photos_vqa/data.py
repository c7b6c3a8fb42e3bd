"""What is asked, in training and in the tests. None of it depends on the photographs."""

from __future__ import annotations

import numpy as np
import torch
from transformers import LlavaProcessor

from ..digits_vqa.questions import Question
from ..digits_vqa.runs import Data, QuestionSet, conversations
from .questions import every_question_type, sample_pairs, sample_questions
from .scenes import Scenes, sample_scenes
from .settings import PhotoSettings
from .stamps import SPLITS

_QUESTIONS_A_SCENE = 6


def ask_for_training(scenes: int) -> tuple[Scenes, list[Question]]:
    """The scenes and questions of ``Data.train``."""
    rng = np.random.default_rng(101)
    sampled = sample_scenes(scenes, rng)
    return sampled, sample_questions(sampled, _QUESTIONS_A_SCENE, rng)


def ask_for_test(scenes: int, split: str) -> tuple[Scenes, list[Question]]:
    """The scenes and questions of ``Data.test``."""
    rng = _rng(301, split)
    sampled = sample_scenes(scenes, rng)
    return sampled, every_question_type(sampled, rng)


def ask_for_pairs(scenes: int, split: str) -> tuple[Scenes, Scenes, list[Question]]:
    """The scenes, first and changed ones, and questions of ``Data.pairs``."""
    first, second, asked = sample_pairs(scenes, _rng(302, split))
    both = []
    for one, other in asked:
        both += [one, Question(other.scene + len(first), other.type, other.text, other.answer)]
    return first, second, both


def _rng(seed: int, split: str) -> np.random.Generator:
    return np.random.default_rng((seed, list(SPLITS).index(split)))


def pictures(settings: PhotoSettings, split: str) -> list[Scenes]:
    """The scenes of a split whose pictures there are, in the order in which they are numbered."""
    if split == "train":
        return [ask_for_training(settings.train_scenes)[0]]
    tested = [ask_for_test(settings.test_scenes, split)[0]]
    # Pairs choose no rate.
    return tested if split == "validation" else [*tested, *ask_for_pairs(settings.test_scenes, split)[:2]]


def make_data(processor: LlavaProcessor, settings: PhotoSettings, split: str) -> Data:
    """Questions on numbered pictures: those of the training, followed by those of the split."""
    _, train = ask_for_training(settings.train_scenes)
    _, test = ask_for_test(settings.test_scenes, split)
    pairs = [] if split == "validation" else ask_for_pairs(settings.test_scenes, split)[2]
    first_test = settings.train_scenes
    return Data(
        _questions(processor, train, 0, settings.train_scenes),
        _questions(processor, test, first_test, settings.test_scenes),
        _questions(processor, pairs, first_test + settings.test_scenes, 2 * settings.test_scenes),
    )


def _questions(processor: LlavaProcessor, questions: list[Question], first: int, scenes: int) -> QuestionSet:
    numbers = torch.arange(first, first + scenes, dtype=torch.float32)
    # There are no pictures any more: what the vision tower made of them is kept.
    none = np.zeros((0, 0, 0, 3), np.uint8)
    return QuestionSet(none, numbers[:, None, None, None], questions, conversations(processor, questions))
