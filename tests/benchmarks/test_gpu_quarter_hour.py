"""The quarter hour with a GPU, without one: the runner, and what becomes of its results."""

from __future__ import annotations

import io
import json
import os
import subprocess
import time

import pytest
import torch
from click import ClickException
from click.testing import CliRunner

from benchmarks.kernels import gpu_quarter_hour, publish, schedules, stages
from benchmarks.kernels.gpu_quarter_hour import LINES, STAGES, Stage, main, run, summary
from benchmarks.kernels.records import Results
from tests.benchmarks.test_kernel_benchmarks import MACHINE, gpu_records

#: A stage that does as it is called.
FAKE = """
import os, subprocess, sys, time
from pathlib import Path
from benchmarks.kernels.gpu_quarter_hour import Log
name, folder = sys.argv[1], Path(sys.argv[sys.argv.index("--output") + 1])
log = Log(folder, name)
log(began=time.time())
if name == "crashes":
    os.abort()
if name == "hangs":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    log(child=child.pid)
    time.sleep(600)
if name.startswith("takes"):
    time.sleep(1)
log(finished=time.time())
sys.exit(name == "fails")
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(gpu_quarter_hour.ROOT))
    monkeypatch.setattr(gpu_quarter_hour, "_LEAST", 0.5)

    def go(*chosen: Stage, seconds: float = 60) -> tuple[int, list[dict]]:
        missed = run(chosen, tmp_path / "out", seconds, module="fake", cwd=tmp_path)
        return missed, lines(tmp_path / "out")

    return go


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / LINES).read_text().splitlines()]


def of(entries: list[dict], stage: str, key: str) -> list:
    return [entry[key] for entry in entries if entry["stage"] == stage and key in entry]


def ended(entries: list[dict]) -> dict[str, bool]:
    return {entry["ended"]: entry["ok"] for entry in entries if "ended" in entry}


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:  # What nobody has waited for yet is no more than a number.
        return file.read().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="looks at processes in /proc")
def test_what_crashes_hangs_or_fails_ends_its_own_stage(fake):
    missed, entries = fake(Stage("crashes", 30), Stage("hangs", 4), Stage("fails", 30), Stage("works", 30))
    assert missed == 3
    assert ended(entries) == {"crashes": False, "hangs": False, "fails": False, "works": True}
    for stage in ("crashes", "hangs", "fails", "works"):
        assert of(entries, stage, "began"), stage
    [child] = of(entries, "hangs", "child")
    deadline = time.monotonic() + 10
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(child)


def test_only_what_may_runs_beside_others(fake):
    missed, entries = fake(
        Stage("takes-1", 30, beside=True), Stage("takes-2", 30, beside=True), Stage("alone", 30), Stage("last", 30)
    )
    assert missed == 0

    def at(stage: str, key: str) -> float:
        [found] = of(entries, stage, key)
        return found

    assert max(at("takes-1", "began"), at("takes-2", "began")) < min(
        at("takes-1", "finished"), at("takes-2", "finished")
    )
    assert at("alone", "began") > max(at("takes-1", "finished"), at("takes-2", "finished"))
    assert at("last", "began") > at("alone", "finished")


def test_the_run_ends_when_its_time_is_over(fake):
    began = time.monotonic()
    missed, entries = fake(Stage("hangs", 100, beside=True), Stage("hangs", 100), Stage("works", 100), seconds=4)
    assert time.monotonic() - began < 12
    assert missed == 3
    assert of(entries, "runner", "left_out") == ["hangs", "works"]


def test_the_summary_ends_with_what_went_wrong(tmp_path):
    log = gpu_quarter_hour.Log(tmp_path, "bench")
    place = {"operation": "modulation", "shape": "LLaVA-1.5", "batch": 64, "phase": "forward", "variant": "triton"}
    log(**place, us=225.4, ratio=0.384)
    log(case="linear", ok=False, wrong=["bias"])
    log(**place, error="OutOfMemoryError")
    log(case="linear", ok=True)
    log(note="no prefill")
    host = gpu_quarter_hour.Log(tmp_path, "host")
    host(operation="linear", host_us_of_call=97.5)
    host(ok=True)
    out = io.StringIO()
    summary(tmp_path, out)
    first, note, call, wrong, failed, last = out.getvalue().splitlines()
    assert first.split()[-3:] == ["225", "us", "x0.38"]
    assert wrong.startswith("!!") and "bias" in wrong
    assert failed.startswith("!!") and "OutOfMemoryError" in failed
    assert (note, call) == (
        'bench: {"note": "no prefill"}',
        'host: {"operation": "linear", "host_us_of_call": 97.5}',
    )
    assert last.startswith("7 results, 2 of them wrong or missing")


def test_every_stage_that_the_runner_names_there_is():
    assert {stage.name for stage in STAGES} == set(stages.STAGES)
    with pytest.raises(SystemExit):
        main(["--output", "nowhere", "--only", "unknown"])


def test_a_sweep_changes_the_schedule_of_one_kernel(monkeypatch):
    pytest.importorskip("triton")
    from emma_adapter.kernels import token_mixing
    from emma_adapter.kernels.launch import Configuration

    launched = []
    monkeypatch.setattr(Configuration, "launch", lambda self, grid, device, **arguments: launched.append(self))
    candidate = next(own for _, own in schedules.CANDIDATES if own.kernel == "mix_forward" and not own.blocks)
    configurations = list(token_mixing.configurations())
    with schedules.using(candidate):
        for configuration in configurations:
            configuration.launch((1,), torch.device("cpu"))
    for before, after in zip(configurations, launched, strict=True):
        own = before.kernel.__name__ == candidate.kernel
        assert (after.num_warps, after.num_stages) == (
            (candidate.num_warps, candidate.num_stages) if own else (before.num_warps, before.num_stages)
        )
        assert after.constants == before.constants
    launched.clear()
    configurations[0].launch((1,), torch.device("cpu"))
    assert launched == configurations[:1]


@pytest.mark.parametrize(("codes", "good"), [([0], True), ([9], False), ([2, 0], True), ([2, 2], False)])
def test_memcheck_tries_again_without_an_option_that_is_not_known(codes, good, tmp_path, monkeypatch):
    commands = []

    def sanitize(command, **options):
        commands.append(command)
        return subprocess.CompletedProcess(command, codes[len(commands) - 1], "", "unknown option")

    monkeypatch.setattr(stages.shutil, "which", lambda name: "compute-sanitizer")
    monkeypatch.setattr(stages.subprocess, "run", sanitize)
    log = gpu_quarter_hour.Log(tmp_path, "memcheck")
    assert stages.memcheck(stages.Run(log, 60, dry=False, began=0)) == good
    assert of(lines(tmp_path), "memcheck", "code") == codes
    assert ["--kernel-name-exclude" in command for command in commands] == [True, False][: len(codes)]


def test_without_a_gpu_and_not_dry_it_says_so(tmp_path):
    assert main(["--output", str(tmp_path), "--only", "facts", "--seconds", "60"]) == 1
    assert "there is no GPU" in of(lines(tmp_path), "facts", "error")[0]


@pytest.mark.slow
def test_a_dry_run_tries_every_stage(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")
    assert main(["--dry-run", "--output", str(tmp_path), "--seconds", "900"]) == 0
    entries = lines(tmp_path)
    assert ended(entries) == {stage.name: True for stage in STAGES}
    for name in ("modulation", "linear", "attention"):
        checked = [entry for entry in entries if entry["stage"] == f"correct-{name}" and "errors" in entry]
        assert len(checked) == (1 if name == "linear" else 2)
        assert all(entry["ran"] == ["triton"] and entry["same_bits"] for entry in checked)
    assert of(entries, "model", "case")
    for file in publish.FILES:
        assert Results.load(tmp_path / file).records
    # The same measurements on a CPU are no reason for anything on a GPU.
    measured, docs = tmp_path / "measured.json", tmp_path / "speed.md"
    docs.write_text(f"{publish.BEGIN}\n{publish.END}\n")
    [written] = publish.publish(tmp_path, tmp_path / "results", docs, measured)
    assert not measured.exists()
    assert docs.read_text() == f"{publish.BEGIN}\n{publish.END}\n"
    assert {path.suffix for path in (tmp_path / "results").iterdir()} == {".json", ".png"}
    assert ".png" in written


# --- what becomes of the results -------------------------------------------------------------------------------


def test_one_command_publishes_a_folder(tmp_path, monkeypatch):
    folder, docs, measured = tmp_path / "gpu", tmp_path / "docs" / "speed.md", tmp_path / "measured.json"
    records = [record for record in gpu_records() if not record.compiled]
    Results(MACHINE, records).save(folder / "table.json")
    again = [record for record in gpu_records({("LLaVA-1.5", 64, "triton"): 40}) if record.shape == "LLaVA-1.5"]
    Results(MACHINE, again).save(folder / "bench-compile.json")
    docs.parent.mkdir()
    docs.write_text(f"# Speed\n\nbefore\n{publish.BEGIN}\nold\n{publish.END}\nafter\n")
    monkeypatch.setattr(publish, "MEASURED_FILE", measured)
    monkeypatch.setattr(publish, "ROOT", tmp_path)

    found = CliRunner().invoke(publish.main, [str(folder)])
    assert found.exit_code == 0, found.output
    assert "attention/bfloat16/forward: Triton from 256 visual tokens on" in found.output
    [file] = (tmp_path / "benchmarks" / "results").glob("*.json")
    assert file.stem == "nvidia-test-2030-01-02"
    assert (file.parent / f"{file.stem}-attention.png").exists()
    stored = Results.load(file).records
    assert len(stored) == len(records) + sum(record.compiled for record in again)
    [time_there] = [r.median_us for r in stored if (r.shape, r.batch, r.variant) == ("LLaVA-1.5", 64, "triton")]
    assert time_there == 40
    assert json.loads(measured.read_text()) == {"NVIDIA Test": {"attention/bfloat16/forward": {"min_tokens": 256}}}
    text = docs.read_text()
    assert text.startswith("# Speed\n\nbefore\n") and text.endswith("after\n")
    assert "old" not in text
    assert "| attention | forward | triton | 40 |" in text

    again = CliRunner().invoke(publish.main, [str(folder)])
    assert again.exit_code == 0
    assert docs.read_text() == text


def test_a_folder_without_measurements_is_refused(tmp_path):
    with pytest.raises(ClickException, match=r"has none of table\.json"):
        publish.merged(tmp_path)


def test_the_documentation_has_a_place_for_the_table():
    text = (gpu_quarter_hour.ROOT / "docs" / "speed.md").read_text()
    assert text.count(publish.BEGIN) == text.count(publish.END) == 1
    assert publish.BEGIN in text.partition(publish.END)[0]
