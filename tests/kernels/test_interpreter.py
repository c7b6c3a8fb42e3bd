from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import budget

pytest.importorskip("triton")

HERE = Path(__file__).parent


#: What only the night runs: the fusions around the operators, and a benchmark's kernel.
NIGHTLY = {"test_fusions_interpreted", "test_numbers_interpreted", "test_sweep_interpreted"}
FILES = [
    pytest.param(path, id=path.stem, marks=[pytest.mark.nightly] if path.stem in NIGHTLY else [])
    for path in sorted(HERE.glob("test_*_interpreted.py"))
]


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES)
def test_kernels_in_tritons_interpreter(path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    draws = [f"--hypothesis-seed={budget.SEED}"] if budget.FULL else []
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *draws, str(path)],
        env={**environment, "TRITON_INTERPRET": "1"},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
