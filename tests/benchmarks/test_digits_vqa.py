"""The benchmark's data, its shipped base model, and the demo from end to end."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from sklearn.datasets import load_digits
from transformers import AutoProcessor, LlavaForConditionalGeneration

from benchmarks.digits_vqa import arms, demo, language
from benchmarks.digits_vqa.questions import QUESTION_TYPES, ask, every_question_type, sample_pairs
from benchmarks.digits_vqa.runs import IGNORE, make_batch, make_data
from benchmarks.digits_vqa.scenes import COLOURS, DIGITS, EMPTY, POSITIONS, SPLITS, render, sample_scenes
from benchmarks.digits_vqa.vlm import BASE_DIR, to_pixel_values
from emma_adapter import cli


def test_no_handwriting_is_in_two_splits():
    digits = load_digits()
    used = {}
    for split in SPLITS:
        scenes = sample_scenes(2000, split, np.random.default_rng(0))
        full = scenes.digits != EMPTY
        used[split] = set(scenes.scans[full].tolist())
        assert (digits.target[scenes.scans[full]] == scenes.digits[full]).all()
    assert not used["train"] & used["test"]
    assert not used["train"] & used["validation"]
    assert not used["validation"] & used["test"]


def test_scenes_are_reproducible_pictures():
    first, second = (render(sample_scenes(5, "train", np.random.default_rng(3))) for _ in range(2))
    assert first.shape == (5, 32, 32, 3)
    assert first.dtype == np.uint8
    assert (first == second).all()
    assert len({picture.tobytes() for picture in first}) == 5


def truth(question: str, digits: list[int], colours: list[int]) -> str:
    """The answer by another road: words to facts about (position, digit, colour) triples."""
    words = question.removesuffix(" ?").split()
    cells = [(i, DIGITS[d], COLOURS[c]) for i, (d, c) in enumerate(zip(digits, colours, strict=True)) if d != EMPTY]
    if words[:4] == ["what", "digit", "is", "at"] or (words[-3:-2] == ["the"] and "at" in words):
        [(_, digit, colour)] = [cell for cell in cells if POSITIONS[cell[0]] == " ".join(words[-2:])]
        return digit if words[1] == "digit" else colour
    if words[:4] == ["what", "colour", "is", "the"]:
        [(_, _, colour)] = [cell for cell in cells if cell[1] == words[-1]]
        return colour
    if words[:2] == ["how", "many"]:
        return DIGITS[sum(words[-1] in cell for cell in cells)]
    if words[:2] == ["is", "there"]:
        return "yes" if any((digit, colour) == (words[-1], words[-2]) for _, digit, colour in cells) else "no"
    [(at, _, _)] = [cell for cell in cells if cell[1:] == (words[-1], words[-2])]
    step = {"left": -1, "right": 1, "above": -2, "below": 2}[words[3]]
    [(_, digit, _)] = [cell for cell in cells if cell[0] == at + step]
    return digit


def test_answers_are_true():
    scenes = sample_scenes(400, "train", np.random.default_rng(1))
    questions = every_question_type(scenes, np.random.default_rng(2))
    assert {question.type for question in questions} == set(QUESTION_TYPES)
    for question in questions:
        assert question.answer == truth(question.text, scenes.digits[question.scene], scenes.colours[question.scene])


def test_no_type_is_answered_by_always_saying_the_same():
    scenes = sample_scenes(800, "test", np.random.default_rng(1))
    for type in QUESTION_TYPES:
        rng = np.random.default_rng(2)
        asked = [ask(type, d, c, rng) for d, c in zip(scenes.digits, scenes.colours, strict=True)]
        answers = [question[1] for question in asked if question is not None]
        assert max(answers.count(answer) for answer in set(answers)) / len(answers) < 0.6


def test_pairs_differ_in_one_attribute_and_in_the_answer():
    first, second, pairs = sample_pairs(200, "test", np.random.default_rng(4))
    assert len(pairs) > 150
    for one, other in pairs:
        i = one.scene
        changes = (first.digits[i] != second.digits[i]).sum() + (first.colours[i] != second.colours[i]).sum()
        assert changes == 1
        assert one.text == other.text
        assert one.answer != other.answer
        assert one.answer == truth(one.text, first.digits[i], first.colours[i])
        assert other.answer == truth(other.text, second.digits[i], second.colours[i])


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(BASE_DIR)


def test_shipped_base_is_a_small_llava_that_is_better_than_chance(processor):
    model = arms.load_base()
    assert isinstance(model, LlavaForConditionalGeneration)
    assert sum(file.stat().st_size for file in BASE_DIR.rglob("*")) < 3e6
    accuracy = language.answer_accuracy(model, "test", n=100)
    assert set(accuracy) == set(QUESTION_TYPES)
    assert np.mean(list(accuracy.values())) > 0.55


def test_batches_supervise_the_answer_alone(processor):
    data = make_data(processor, train_scenes=20, test_scenes=5, pairs=8, split="validation").train
    chosen = list(range(0, 80, 7))
    batch = make_batch(processor.tokenizer, data, chosen, answered=True)
    for row, i in enumerate(chosen):
        supervised = batch["labels"][row] != IGNORE
        assert torch.equal(batch["labels"][row][supervised], batch["input_ids"][row][supervised])
        assert processor.tokenizer.decode(batch["labels"][row][supervised]) == f"{data.questions[i].answer} </s>"
        prompt = processor.tokenizer.decode(batch["input_ids"][row][~supervised])
        assert f"USER: <image> {data.questions[i].text} ASSISTANT:" in prompt
    pictures = data.pictures[[data.questions[i].scene for i in chosen]]
    torch.testing.assert_close(batch["pixel_values"], to_pixel_values(pictures))


def test_lora_has_the_adapters_size(processor):
    emma = arms.emma("attention")(arms.load_base(), processor)
    rank = arms.lora_of_size(arms.load_base(), emma.num_parameters)
    lora = arms.lora(rank)(arms.load_base(), processor)
    assert abs(lora.num_parameters / emma.num_parameters - 1) < 0.1


def test_demo_tells_the_whole_story(tmp_path):
    arguments = ["--steps", "2", "--train-scenes", "40", "--test-scenes", "12", "--output", str(tmp_path)]
    result = CliRunner().invoke(demo.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "the same answers" in result.output
    table = (tmp_path / "table.md").read_text()
    assert table in result.output
    for part in (*QUESTION_TYPES, "base", "EMMA, modulation", "shuffled instructions", "LoRA", "and LoRA", "pairs"):
        assert part in table
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [record["steps"] for record in records] == [0, 2, 2, 2, 2, 2]
    both, lora = (record["parameters"] for record in records[-2:])
    assert both == records[1]["parameters"] + records[3]["parameters"] == pytest.approx(lora, rel=0.05)
    for name in ("answers.png", "maps.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    [command] = [line.split() for line in result.output.splitlines() if "emma-adapter report" in line]
    shown = CliRunner().invoke(cli.main, [*command[1:], "--limit", "21", "--show", "2", "--device", "cpu"])
    assert shown.exit_code == 0, shown.output
    assert "21 questions, 2 of them shown" in shown.output and (tmp_path / "report.html").is_file()


def test_the_base_model_is_refused_without_its_class(tmp_path):
    """Stock LLaVA would not pool."""
    (tmp_path / "data.jsonl").write_text('{"image": "a.png", "question": "what?"}')
    arguments = ["report", "--model", str(BASE_DIR), "--adapter", "a", "--data", str(tmp_path / "data.jsonl")]
    result = CliRunner().invoke(cli.main, arguments)
    assert result.exit_code == 2 and "PooledLlava, which transformers doesn't have" in result.stderr
