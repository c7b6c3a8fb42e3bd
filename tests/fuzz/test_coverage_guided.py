"""Thousands of runs of the coverage-guided fuzzers; see coverage_guided.py for more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.budget import SEED, budget

SCRIPT = Path(__file__).with_name("coverage_guided.py")


def fuzz(folder: Path, target: str, *options: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("atheris", reason="atheris has wheels for Linux on x86-64 only")
    limits = [f"-seed={SEED + 1}", "-max_len=16384", "-timeout=60", f"-artifact_prefix={folder}/"]
    command = [sys.executable, str(SCRIPT), target, *limits, *options]
    # libFuzzer leaves without cleaning up.
    environment = {**os.environ, "TMPDIR": str(folder)}
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=600, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize(("target", "runs"), [("config", budget(1_000, 50_000)), ("header", budget(300, 4_000))])
def test_no_run_ends_in_anything_but_a_typed_error(target, runs, tmp_path):
    done = fuzz(tmp_path, target, f"-runs={runs}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"Done {runs} runs" in done.stderr


def test_a_target_that_raises_is_noticed(tmp_path, monkeypatch):
    """With configs that are never the same."""
    broken = tmp_path / "sitecustomize.py"
    broken.write_text("from emma_adapter import EmmaConfig\nEmmaConfig.__eq__ = lambda self, other: False\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = fuzz(tmp_path, "config", "-runs=2000")
    assert done.returncode != 0
    assert "Uncaught Python exception" in done.stdout + done.stderr
