"""The ablation's statistics, tables and command."""

from __future__ import annotations

import dataclasses
import json

import click
import numpy as np
import pytest
import scipy.stats
from click.testing import CliRunner
from filelock import FileLock

from benchmarks.digits_vqa.ablation import __main__ as command
from benchmarks.digits_vqa.ablation import recipes, records
from benchmarks.digits_vqa.ablation.duration import describe, seconds
from benchmarks.digits_vqa.ablation.plan import Base, Cell, Towers
from benchmarks.digits_vqa.ablation.records import Record
from benchmarks.digits_vqa.ablation.report import write_report
from benchmarks.digits_vqa.ablation.results import Results
from benchmarks.digits_vqa.ablation.statistics import Clusters, mean_over_types
from benchmarks.digits_vqa.ablation.studies import STUDIES
from benchmarks.digits_vqa.ablation.summary import ceilings_table, signed
from benchmarks.digits_vqa.ablation.sweep import Sweep
from benchmarks.digits_vqa.ablation.worker import fingerprint
from benchmarks.digits_vqa.questions import QUESTION_TYPES
from benchmarks.digits_vqa.runs import ask_for_pairs, ask_for_test

# ------------------------------------------------------------------------------------------ statistics


def test_intervals_against_scipy():
    rng = np.random.default_rng(3)
    scenes = np.repeat(np.arange(60), rng.integers(1, 6, 60))
    types = rng.integers(0, 2, len(scenes))
    values = (rng.random(len(scenes)) < 0.2 + 0.5 * rng.random(60)[scenes]).astype(float)

    def statistic(drawn):
        rows = np.concatenate([np.flatnonzero(scenes == scene) for scene in drawn])
        return np.mean([values[rows][types[rows] == type].mean() for type in (0, 1)])

    wanted = scipy.stats.bootstrap(
        (np.arange(60),), statistic, vectorized=False, n_resamples=1500, method="percentile", random_state=1
    ).confidence_interval
    found = mean_over_types(values, Clusters(scenes, types))
    assert found.value == pytest.approx(statistic(np.arange(60)))
    assert found.low == pytest.approx(wanted.low, abs=0.015)
    assert found.high == pytest.approx(wanted.high, abs=0.015)


def test_questions_of_one_scene_count_as_one():
    """Ten copies of each question don't make the interval narrower; it is that of the mean of scenes."""
    right = np.random.default_rng(0).random(400) < 0.5
    found = mean_over_types(
        np.repeat(right, 10).astype(float), Clusters(np.repeat(np.arange(400), 10), np.zeros(4000, int))
    )
    assert found.half_width == pytest.approx(1.96 * right.std() / 20, rel=0.05)


# ------------------------------------------------------------------------------------------ report and command


PRACTICE, PARTS = STUDIES["practice"], STUDIES["parts"]
SETTINGS = dataclasses.replace(PRACTICE.settings, test_scenes=100)
A = recipes.ADAPTER_SIZE


def made_up(settings, chance, size, pooling="1"):
    """Records of arms that are right with such a chance, on two base checkpoints."""
    _, questions = ask_for_test(settings.test_scenes, "test")
    _, _, pairs = ask_for_pairs(settings.test_scenes, "test")
    types = np.array([question.type for question in questions])
    made = []
    for number, (arm, share) in enumerate(chance.items()):
        for base in (0, 1):
            rng = np.random.default_rng((number, base, len(pooling)))
            right, of_pairs = rng.random(len(questions)) < share, rng.random(len(pairs)) < share
            accuracy = {type: float(right[types == type].mean()) for type in QUESTION_TYPES}
            made.append(
                Record(
                    arm=arm, pooling=pooling, base=base, seed=0, split="test", rate=5e-3, rate_at_edge=False,
                    settings=dataclasses.asdict(settings), parameters=size[arm], seconds=1.0, cpu_seconds=1.0,
                    mean=float(np.mean(list(accuracy.values()))), accuracy=accuracy, pairs=0.5,
                    right=records.pack(right), pairs_right=records.pack(of_pairs),
                    questions=fingerprint(questions + pairs),
                )
            )  # fmt: skip
    return made


def adapters_alone(settings=SETTINGS):
    """``modulation`` is right far more often than LoRA, which is the best of the controls; ``linear`` isn't."""
    chance = {"modulation": 0.85, "linear": 0.61, recipes.lora(): 0.62, recipes.LORA_QV: 0.5, recipes.BASE: 0.4}
    chance[recipes.PROJECTOR_LORA] = 0.95
    size = dict.fromkeys(chance, A) | {recipes.PROJECTOR_LORA: 62_000, recipes.BASE: 0}
    return made_up(settings, chance, size)


def practice():
    """With one token an image the adapter helps LoRA; with four and with all of them it doesn't."""
    size = {recipes.BASE: 0, "modulation": A, recipes.with_roles("modulation"): A, recipes.TWO_STEPS: A}
    size |= {recipes.lora(multiple): multiple * A for multiple in recipes.MULTIPLES}
    size |= {recipes.joint("modulation", multiple): (multiple + 1) * A for multiple in (1, 2)}
    made = []
    for pooling, low, high in (("1", 0.4, 0.85), ("4", 0.6, 0.6), ("16", 0.9, 0.9)):
        chance = dict.fromkeys(size, low)
        chance |= dict.fromkeys(("modulation", *(recipes.joint("modulation", multiple) for multiple in (1, 2))), high)
        made += made_up(SETTINGS, chance, size, pooling)
    return made


def written(made, study, folder):
    for record in made:
        records.append(folder / "results.jsonl", record)
    write_report(study, folder / "results.jsonl", SETTINGS, "modulation")
    assert (folder / "results.png").read_bytes().startswith(b"\x89PNG")
    return (folder / "results.md").read_text(encoding="utf-8")


def test_report_computes_the_best_control_of_equal_size(tmp_path):
    made = adapters_alone()
    results = Results(made, SETTINGS, "modulation")
    modulation, linear = results.get("modulation"), results.get("linear")
    # The projector with LoRA is better, and larger.
    assert results.best_control(modulation).arm == recipes.lora()
    wanted = np.mean([r.mean for r in made if r.arm == "modulation"]) - np.mean(
        [r.mean for r in made if r.arm == recipes.lora()]
    )
    gain = results.gain(modulation, results.best_control(modulation))
    assert gain.value == pytest.approx(wanted, abs=1e-4)
    assert gain.low < gain.value < gain.high
    assert results.gain(linear, results.best_control(linear)).low < 0
    text = written(made, PARTS, tmp_path)
    assert "- `modulation` over LoRA on all linears: +2" in text
    assert "tells from zero: linear (1 token an image)." in text


def test_adapter_and_lora_are_compared_with_lora_of_their_total_size():
    chance = {recipes.lora(): 0.9, recipes.lora(2): 0.6, recipes.lora(3): 0.95, recipes.joint("modulation"): 0.7}
    size = {recipes.lora(): A, recipes.lora(2): 2 * A, recipes.lora(3): 3 * A, recipes.joint("modulation"): 2 * A}
    results = Results(made_up(SETTINGS, chance, size), SETTINGS, "modulation")
    joint = results.get(recipes.joint("modulation"))
    assert {control.arm for control in results.controls(joint)} == {recipes.lora(), recipes.lora(2)}
    # A control isn't left out because a larger one is worse.
    assert results.best_control(joint).arm == recipes.lora()


def test_what_practice_does_is_told_by_pooling(tmp_path):
    made = practice()
    results = Results(made, SETTINGS, "modulation")
    text = written(made, PRACTICE, tmp_path)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.split("\n\n")[0].splitlines()]
    assert [row[0] for row in rows[2:]] == ["1", "4", "16"]
    gains = [rows[0].index(name) for name in ("over LoRA, 2A", "over LoRA, 3A")]
    for row in rows[2:]:
        for place, multiple in zip(gains, (1, 2), strict=True):
            both, lora = (
                np.mean([record.mean for record in made if (record.arm, record.pooling) == (arm, row[0])])
                for arm in (recipes.joint("modulation", multiple), recipes.lora(multiple + 1))
            )
            assert float(row[place].split(" ")[0]) == pytest.approx(100 * (both - lora), abs=0.051)
    goals = [line for line in text.splitlines() if "the goal of" in line]
    assert [line.split("the goal of ")[1] for line in goals] == ["12 is reached."] * 2 + ["2 is missed."] * 4
    assert signed(results.gain(results.get(recipes.with_roles("modulation")), results.get("modulation"))) in text


def test_shares_are_of_the_way_to_the_ceiling():
    results = Results(practice(), SETTINGS, "modulation")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in ceilings_table(results, "1").splitlines()]
    of = {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[2:]}
    assert set(of) == {*QUESTION_TYPES, "**mean**"}
    for row in of.values():
        base, ceiling, reached = (float(row[name].split(" ")[0]) for name in ("base", "ceiling", "modulation"))
        share = float(row["modulation"].split("(")[1].split(" ")[0])
        assert share == pytest.approx(100 * (reached - base) / (ceiling - base), abs=1)
    # All tokens are the ceiling, and where nothing is to gain there is no share.
    assert ceilings_table(results, "16") == ""
    level = [*made_up(SETTINGS, {recipes.BASE: 0.9, "modulation": 0.9}, {recipes.BASE: 0, "modulation": A}, "4")]
    level += [dataclasses.replace(record, pooling="16") for record in level]
    assert "%" not in ceilings_table(Results(level, SETTINGS, "modulation"), "4")


def test_the_shipped_tables_are_those_of_the_shipped_records():
    results = Results(records.read(PARTS.results), PARTS.settings, "modulation")
    assert PARTS.markdown(results) == PARTS.results.with_suffix(".md").read_text(encoding="utf-8")


def test_the_shipped_records_are_a_whole_study(tmp_path):
    assert Sweep(PARTS.plan("modulation"), PARTS.settings, PARTS.results, tmp_path).pending == []


def test_records_of_other_questions_are_refused():
    made = [dataclasses.replace(record, questions="others") for record in adapters_alone()]
    with pytest.raises(click.ClickException, match="remove the results file"):
        Results(made, SETTINGS, "modulation")


@pytest.mark.parametrize("name", STUDIES)
def test_the_plan_is_printed_and_nothing_else_happens(name, tmp_path):
    paths = ["--results", str(tmp_path / "a" / "results.jsonl"), "--work", str(tmp_path / "work")]
    result = CliRunner().invoke(command.main, ["--plan", "--study", name, *paths], catch_exceptions=False)
    jobs = STUDIES[name].plan("modulation")
    runs, bases = (sum(isinstance(job, kind) for job in jobs) for kind in (Cell, Base))
    # One is shipped.
    assert f"{runs} runs and {bases - (name == 'parts')} base checkpoints in all" in result.output
    assert not list(tmp_path.iterdir())


def test_a_study_takes_as_long_as_its_jobs():
    jobs = [Towers(0), Towers(1), Base(0, "4"), Base(0, "16"), Cell("modulation", "4", 0, 0, "test", None)]
    took = [seconds(job, SETTINGS) for job in jobs]
    assert took[0] == 0 < took[1] < took[2] < took[3] and took[4] > 0
    deeper = dataclasses.replace(SETTINGS, language_layers=4)
    assert 1.9 < (seconds(jobs[3], deeper) - 40) / (took[3] - 40) < 2.1
    assert f"{sum(took) / 3600:.1f} core hours" in describe(jobs, SETTINGS, 2)


def test_mistakes_are_explained(tmp_path):
    paths = ["--results", str(tmp_path / "results.jsonl"), "--work", str(tmp_path)]
    result = CliRunner().invoke(command.main, ["--only", "lora", "--plan", *paths])
    assert result.exit_code == 2
    assert "LoRA on all linears, 2A" in result.output
    result = CliRunner().invoke(command.main, ["--study", "parts", "--language-layers", "4", "--plan", *paths])
    assert result.exit_code == 2
    assert "language_layers" in result.output and "no such setting" in result.output
    with FileLock(tmp_path / "sweep.lock"):
        result = CliRunner().invoke(command.main, paths)
    assert result.exit_code == 1
    assert "another sweep is running" in result.output


def test_a_record_is_one_json_line(tmp_path):
    path = tmp_path / "results.jsonl"
    record = adapters_alone(dataclasses.replace(SETTINGS, test_scenes=10))[0]
    records.append(path, record)
    records.append(path, record)
    lines = path.read_text().splitlines()
    assert [json.loads(line)["arm"] for line in lines] == ["modulation"] * 2
    assert records.read(path) == [record, record]
