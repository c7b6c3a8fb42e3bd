"""The benchmark of vision experts: charts that show their digits, and a command that goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from benchmarks.digits_unified import experts
from benchmarks.digits_unified.figures import load_records
from benchmarks.digits_unified.scenes import GRIDS, sample_scenes, to_cells, with_cells
from benchmarks.digits_vqa.scenes import EMPTY


@pytest.mark.parametrize("grid", GRIDS)
def test_a_bar_is_as_high_as_its_digit_and_of_its_colour(grid):
    scenes = sample_scenes(40, "test", np.random.default_rng(0), grid=grid)
    pictures = experts.render_charts(scenes)
    assert pictures.shape == (40, 3, 32 * grid, 32 * grid)
    assert torch.equal((pictures * 255).round() / 255, pictures) and 0 <= pictures.min() <= pictures.max() <= 1
    empty = experts.render_charts(scenes_without_digits(scenes))
    bars = (to_cells(pictures) != to_cells(empty)).any(2)
    heights = bars.any(3).sum(2).numpy()
    full = scenes.digits != EMPTY
    assert (heights[~full] == 0).all()
    assert (heights[full] == np.floor(1 + 2.7 * scenes.digits[full] + 1e-4)).all()
    assert (bars.any(2).sum(2).numpy()[full] == 10).all()
    inks = to_cells(pictures).masked_fill(~bars[:, :, None], -1).flatten(3).amax(3)
    names = inks.argmax(2).numpy()
    strongest = np.array([0, 1, 2, 0])  # red, green, blue, yellow
    assert (names[full] == strongest[scenes.colours[full]]).all()


def scenes_without_digits(scenes):
    nothing = np.full_like(scenes.digits, EMPTY)
    return with_cells(scenes, digits=nothing, colours=nothing)


def test_a_stopped_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(experts, "SEEDS", (0, 1))
    results = tmp_path / "results.jsonl"
    arguments = ["--results", str(results), "--work", str(tmp_path / "work"), "--steps", "2", "--scenes", "6"]
    done = CliRunner().invoke(experts.main, arguments, catch_exceptions=False)
    assert done.exit_code == 0 and "2 seeds, 6 questions of each kind, 2 steps" in done.output
    both = load_records(results)
    assert [record["seed"] for record in both] == [0, 1]
    assert all(record["digits with the stock's bits"] == 1.0 for record in both)
    assert all(record["right"]["stock, digits"] == record["right"]["routed, digits"] for record in both)
    results.write_text(json.dumps(both[0]) + "\n")
    CliRunner().invoke(experts.main, arguments, catch_exceptions=False)
    again = load_records(results)
    # The second seed's training was finished, and is taken from where it lies.
    assert {**again[1], "seconds": 0} == {**both[1], "seconds": 0}
    assert results.with_suffix(".md").read_text() == experts.table(again)


def test_the_table_is_that_of_the_records():
    records = load_records(experts.RESULTS)
    assert {record["seed"] for record in records} <= set(experts.SEEDS)
    text = experts.table(records)
    assert experts.RESULTS.with_suffix(".md").read_text() == text
    assert text in (Path(__file__).parents[2] / "docs" / "vision-experts.md").read_text()
    for record in records:
        assert record["digits with the stock's bits"] == 1.0
        assert record["right"]["stock, digits"] == record["right"]["routed, digits"]
