"""Probes and the diagnosis, on features whose decodability is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from torch import nn

from emma_adapter import AnalysisError, EmmaConfig, patch_model
from emma_adapter.analysis import diagnose, probe
from tests.support import tiny
from tests.support.budget import budget
from tests.support.zoo import ZOO, Row


def blobs(n: int, d: int, distance: float, seed: int = 0, classes: int = 3):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    return rng.standard_normal((n, d)) + np.eye(classes, d)[labels] * distance, labels


@pytest.mark.parametrize("distance", [2.0, 4.0])
def test_a_probe_tells_what_a_linear_classifier_tells(distance):
    x, y = blobs(200, 10, distance)
    found = probe(x, y)
    other = cross_val_score(LogisticRegression(), x, y, cv=5).mean()
    assert abs(found.accuracy - other) < 0.05
    assert found.decodable and found.p_value == 0.05
    assert found.chance == np.bincount(y).max() / 200
    assert abs(found.shuffled - 1 / 3) < 0.07
    assert found.right.mean() == found.accuracy
    assert (found.samples, found.classes) == (200, 3)


def test_of_noise_nothing_is_decodable():
    """More features than samples, which a probe could learn by heart."""
    found = [probe(*blobs(60, 200, 0.0, seed), seed=seed) for seed in range(4)]
    assert not any(one.decodable for one in found)
    assert all(one.shuffled_max < 0.65 for one in found)


def test_what_only_a_nonlinear_map_reads_is_not_decodable():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 2))
    assert not probe(x, x[:, 0] * x[:, 1] > 0).decodable


def test_rare_labels_are_left_out():
    x, y = blobs(100, 4, 4.0)
    names = np.array(["a", "b", "c"])[y]
    names[:3] = "rare"
    found = probe(x, names)
    assert (found.samples, found.classes) == (97, 3)
    assert not found.right[:3].any()


@pytest.mark.nightly
def test_groups_are_probed_apart():
    """Each by itself, as if there were no other."""
    parts = [blobs(60, 8, 2.0, seed) for seed in range(3)]
    x, y = (np.concatenate(one) for one in zip(*parts, strict=True))
    groups = np.repeat(["a", "b", "c"], 60)
    alone = [probe(*part) for part in parts]
    order = np.random.default_rng(0).permutation(180)
    found = probe(x[order], y[order], groups=groups[order])
    assert abs(found.accuracy - np.mean([one.accuracy for one in alone])) < 0.06
    assert found.chance == pytest.approx(np.mean([one.chance for one in alone]))
    assert found.decodable and found.samples == 180
    # What follows from the group alone isn't read off the features.
    rng = np.random.default_rng(0)
    number = np.repeat([0, 1, 2], 60)
    shown = np.concatenate([rng.standard_normal((180, 4)), 10 * np.eye(3)[number]], axis=1)
    likely = (number % 2 == 0) ^ (rng.random(180) < 0.2)
    assert probe(shown, likely).decodable and not probe(shown, likely, groups=groups).decodable
    with pytest.raises(AnalysisError, match="one for each"):
        probe(x, y, groups=groups[:-1])


def test_of_groups_those_with_one_label_are_left_out():
    x, y = blobs(100, 4, 4.0)
    groups = np.repeat([0, 1], 50)
    y[50:] = 0
    found = probe(x, y, groups=groups)
    assert found.samples == 50 and not found.right[50:].any()


# ----------------------------------------------------------------------------------------------------- of a model


QUESTIONS = {"left": "what is left?", "dogs": "how many dogs are there?"}


def painted_batches(number: int = 80, *, bright: bool = True):
    """Pictures whose left half is bright or dark, and, drawn apart, their right half; asked for the one or other."""
    rng = np.random.default_rng(0)
    halves, asked = rng.integers(0, 2, (number, 2)), rng.integers(0, 2, number)
    pixels = rng.standard_normal((number, 3, 28, 28)).astype(np.float32) * 0.5
    if bright:
        pixels[:, :, :, :14] += 3 * halves[:, :1, None, None] - 1.5
        pixels[:, :, :, 14:] += 3 * halves[:, 1:, None, None] - 1.5
    names = np.array(list(QUESTIONS))[asked]
    batches = []
    for start in range(0, number, 20):
        rows = [Row((QUESTIONS[name],), images=((28, 28),)) for name in names[start : start + 20]]
        batches.append({**ZOO["llava"].batch(rows), "pixel_values": torch.tensor(pixels[start : start + 20])})
    return batches, halves[np.arange(number), asked], names


class Blind(nn.Module):
    """A projector that lets nothing of what it reads pass."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(width))

    def forward(self, image_features):
        return image_features * self.scale


def model_with(projector: nn.Module | None = None):
    model = ZOO["llava"].model()
    if projector is not None:
        model.model.multi_modal_projector = projector
    adapter = patch_model(model, EmmaConfig(inner_dim=16), processor=ZOO["llava"].processor())
    tiny.train_randomly(nn.ParameterList(adapter.parameters()))
    return model


def test_an_answer_that_passes_the_projector_needs_no_adapter():
    batches, answers, asked = painted_batches()
    found = diagnose(model_with(), batches, answers, asked)
    assert {one.name for one in found.attributes} == set(QUESTIONS)
    for one in found.attributes:
        assert one.visual.decodable and one.projected.decodable
        assert one.verdict == "reaches the model already"
    assert found.instruction is not None and found.instruction.accuracy == 1
    assert found.verdict == "reaches the model already" and "LoRA" in found.meaning


def test_an_answer_that_the_projector_loses_is_what_an_adapter_can_help_with():
    batches, answers, asked = painted_batches()
    found = diagnose(model_with(Blind(32)), batches, answers, asked)
    for one in found.attributes:
        assert one.visual.decodable and not one.projected.decodable
        assert one.lost > 2 * one.lost_error > 0
    assert found.verdict == "can help"
    table = found.table()
    assert table.count("| can help |") == 2
    assert "*what is asked*" in table and "**can help**" in table
    assert all(name in table for name in QUESTIONS)


class Pooled(nn.Module):
    """A projector that leaves one token, the mean: of two halves, how bright both are together."""

    def forward(self, image_features):
        return image_features.mean(1, keepdim=True).expand_as(image_features)


@pytest.mark.nightly
def test_two_questions_under_one_name_are_told_apart():
    """Which half is bright can be read off the tokens once it is known which is asked, and not off their mean."""
    batches, answers, _ = painted_batches(160)
    found = diagnose(model_with(Pooled()), batches, answers, ["half"] * 160)
    [asked] = found.attributes
    assert (asked.instructions, asked.apart, asked.visual.samples) == (2, True, 160)
    assert asked.visual.accuracy > 0.95 and asked.projected.accuracy < 0.85
    assert found.verdict == "can help"
    assert diagnose(model_with(Pooled()), batches, answers).verdict == "can help"


def test_questions_that_are_worded_differently_each_time_prove_nothing():
    """Together a probe reads as little before the projector as behind it, whatever passes."""
    batches, answers, _ = painted_batches(160)
    for number, batch in enumerate(batches):
        batch["instruction"] = [f"{'two dogs and ' * row} {'a cat ' * number} what?" for row in range(20)]
    found = diagnose(model_with(Pooled()), batches, answers, ["half"] * 160)
    [asked] = found.attributes
    assert asked.instructions == 160 and not asked.apart
    assert not asked.loses and asked.projected.decodable
    assert found.verdict == "can't be told" and "name what is asked" in found.meaning


def test_the_order_of_the_words_makes_another_question():
    batches, answers, asked = painted_batches()
    for batch in batches:
        batch["instruction"] = "two dogs and one cat"
    batches[0]["instruction"] = "one dogs and two cat"
    found = diagnose(model_with(), batches, answers, asked)
    assert [one.instructions for one in found.attributes] == [2, 2]


def test_a_trace_of_the_answer_is_not_the_answer():
    """That as little is read behind the projector as before it, doesn't mean that the answer passes."""
    batches, answers, _ = painted_batches(160)
    for batch in batches:
        batch["instruction"] = "what?"
    [asked] = diagnose(model_with(), batches, answers).attributes
    assert not asked.loses and asked.projected.decodable and asked.projected.level[0] < 0.5
    assert asked.verdict == "can't be told"


def test_the_verdict_is_that_of_what_can_be_told():
    batches, answers, asked = painted_batches(160)
    found = diagnose(model_with(Blind(32)), batches, answers, asked)
    one, other = found.attributes
    untold = replace(other, visual=replace(other.visual, samples=1000), verdict="can't be told")
    assert replace(found, attributes=(one, untold)).verdict == one.verdict == "can help"
    assert replace(found, attributes=(untold,)).verdict == "can't be told"


def test_an_answer_that_no_token_shows_is_lost_to_any_adapter():
    batches, answers, asked = painted_batches(bright=False)
    found = diagnose(model_with(Blind(32)), batches, answers, asked)
    assert found.verdict == "not linear in the visual tokens"


@pytest.mark.nightly
def test_an_instruction_that_does_not_tell_what_is_asked():
    batches, answers, asked = painted_batches()
    for batch in batches:
        batch["instruction"] = "yes."
    found = diagnose(model_with(Blind(32)), batches, answers, asked)
    assert found.verdict == "not in the instruction"
    # Where all ask the same, there is nothing to tell.
    one = diagnose(model_with(Blind(32)), batches, [*answers[:40], *answers[40:]])
    assert one.instruction is None and one.attributes[0].name == "all"


@pytest.mark.parametrize(
    "name", budget(["qwen2_5_vl", "llava_next"], ["qwen2_5_vl", "llava_next", "internvl", "mistral3", "gemma3"])
)
def test_images_of_any_size(name):
    entry = ZOO[name]
    model = entry.model()
    patch_model(model, processor=entry.processor())
    sizes = [(56, 56), (112, 56), (28, 84)]
    rows = [Row(images=(sizes[i % 3],) * (1 + i % 2), seed=i) for i in range(24)]
    found = diagnose(model, [entry.batch(rows[:12]), entry.batch(rows[12:])], [i % 2 for i in range(24)])
    assert found.attributes[0].visual.samples == 24
