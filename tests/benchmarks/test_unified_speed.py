from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner

from benchmarks.unified import model, speed

pytest.importorskip("diffusers")


def test_every_call_is_timed_beside_what_it_is_compared_with(tmp_path, monkeypatch):
    monkeypatch.setitem(model.SIZES, "small", model.Size(layers=2, width=64, intermediate=96, heads=1, kv_heads=1))
    output = tmp_path / "speed.json"
    arguments = ["--pixels", "64", "--prompt", "20", "--rounds", "2", "--output", str(output)]
    done = CliRunner().invoke(speed.main, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    told = json.loads(output.read_text())
    assert not told["errors"]
    records = told["records"]
    assert [(record["group"], record["call"]) for record in records] == [
        (group, call) for group, calls in speed.GROUPS.items() for call in calls
    ]
    firsts = {record["group"]: record for record in reversed(records)}
    assert all(record["ratio"] == 1 and record["milliseconds"] > 0 for record in firsts.values())


def test_a_token_wise_reference_makes_the_prompt_one_picture_longer():
    drawings = {"rank": model.make(model.Size(2, 64, 96, 1, 1), 4, torch.device("cpu"), torch.float32)}
    case = speed.Case(drawings, 96, 5)
    assert case.tokens == 9 and case.longer().length == case.prefix.length + 9
    assert all(keys.shape[2] == case.longer().length for keys, _ in case.longer().states)
