"""The three experiments on a model of the user's: a tiny LLaVA with random weights."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForImageTextToText

from benchmarks.real_model import __main__ as command
from benchmarks.real_model import arms
from benchmarks.real_model.measure import overhead, right_answers
from emma_adapter import get_adapter
from emma_adapter.data.rows import open_rows
from emma_adapter.models.loading import load_processor
from tests.support.workspace import MODEL_ID, make_workspace

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return make_workspace(tmp_path_factory.mktemp("workspace"))


@pytest.fixture(autouse=True)
def _inside(workspace, monkeypatch, registry):
    monkeypatch.chdir(workspace)


def run(output, *options):
    arguments = ["--model", MODEL_ID, "--data", "train.jsonl", "--eval-data", "train.jsonl", "--output", str(output)]
    arguments += ["--steps", "2", "--batch-size", "2", "--rounds", "2", "--device", "cpu", "--lr", "1e-2"]
    return CliRunner().invoke(command.main, [*arguments, *options])


@pytest.mark.slow
def test_all_experiments_with_one_command_that_goes_on(tmp_path):
    output = tmp_path / "records.jsonl"
    result = run(output)
    assert result.exit_code == 0, result.output
    records = {record["arm"]: record for record in map(json.loads, output.read_text().splitlines())}
    assert list(records) == ["base", *arms.names("modulation")]
    projection, alignment = (records[name]["parameters"] for name in arms.LINEAR_PARTS)
    assert projection + alignment == records["linear"]["parameters"]
    per_rank = 2 * 2 * (32 + 32)
    assert abs(records["LoRA"]["parameters"] - records["modulation"]["parameters"]) <= per_rank / 2
    for name in ("modulation", "linear", *arms.LINEAR_PARTS):
        # Disabled, it answers as the model that never met it.
        assert records[name]["accuracy_disabled"] == records["base"]["accuracy"]
        assert records[name]["forward"]["ratio"] > 0
        assert f"| {name}" in result.output
    lines = output.read_text().splitlines()
    output.write_text("\n".join(lines[:-1]) + "\n")
    assert run(output).exit_code == 0
    assert [json.loads(line)["arm"] for line in output.read_text().splitlines()] == list(records)


def test_each_arm_leaves_the_model_as_it_was():
    model = AutoModelForImageTextToText.from_pretrained(MODEL_ID)
    before = {name: (value.clone(), value.requires_grad) for name, value in model.named_parameters()}
    processor = load_processor(MODEL_ID)
    with arms.adapter(model, processor, "linear", "llm") as handle:
        assert {name for name, value in model.named_parameters() if value.requires_grad}
        assert get_adapter(model).num_parameters() == handle.num_parameters()
    with arms.lora(model, 5000) as wrapped:
        trained = {name for name, value in wrapped.named_parameters() if value.requires_grad}
        assert trained
        assert all("language_model" in name and ("q_proj" in name or "v_proj" in name) for name in trained)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    for name, (value, trainable) in before.items():
        assert torch.equal(after[name], value)
        assert after[name].requires_grad == trainable


def test_an_answer_is_right_apart_from_case_and_punctuation(monkeypatch):
    model, processor = AutoModelForImageTextToText.from_pretrained(MODEL_ID), load_processor(MODEL_ID)
    rows = open_rows("train.jsonl", "train", None)
    said = processor.tokenizer("Two.", add_special_tokens=False, return_tensors="pt")["input_ids"]

    def generate(input_ids, pixel_values, max_new_tokens, **options):
        assert len(pixel_values) == 1
        assert max_new_tokens > 8
        return torch.cat([input_ids, said], dim=1)

    monkeypatch.setattr(model, "generate", generate)
    # Two of the eight questions are answered with "two".
    assert right_answers(model, processor, rows, "x") == [True, False, False, False] * 2


def test_overhead_compares_with_the_disabled_adapter():
    seen = []
    enabled = [True]

    class Disabled:
        def __enter__(self):
            enabled[0] = False

        def __exit__(self, *error):
            enabled[0] = True

    found = overhead(lambda: seen.append(enabled[0]), Disabled, 4)
    assert sorted(seen) == [False] * 5 + [True] * 5
    assert found["ratio_20th"] <= found["ratio"] <= found["ratio_80th"]


def test_mistakes_are_explained(tmp_path):
    result = run(tmp_path / "records.jsonl", "--eval-data", "nowhere.jsonl")
    assert result.exit_code == 1
    assert "nowhere.jsonl" in result.output
    (tmp_path / "records.jsonl").write_text("{\n")
    result = run(tmp_path / "records.jsonl")
    assert result.exit_code == 1
    assert "line 1" in result.output and "remove it" in result.output
