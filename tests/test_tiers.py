"""What the everyday tier leaves out, and that the full one leaves out nothing."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest

from tests.support import ROOT, budget
from tests.support.zoo import ZOO


def test_in_the_everyday_tier_every_two_values_meet():
    axes = (list(ZOO), ["attention", "linear", "modulation"], ["llm", "clip", "custom"])
    drawn = budget.combinations(*axes)
    for one, other in itertools.combinations(range(3), 2):
        assert {(row[one], row[other]) for row in drawn} == set(itertools.product(axes[one], axes[other]))
    assert len(set(drawn)) == len(drawn) == (len(list(itertools.product(*axes))) if budget.FULL else len(ZOO) * 3)
    modes = budget.some(2, list(ZOO), "abcde")
    assert {mode for _, mode in modes} == set("abcde") and {name for name, _ in modes} == set(ZOO)


@pytest.mark.nightly
@pytest.mark.parametrize("full", ["", "full"])
def test_what_is_for_the_night_is_left_out_by_day(full):
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    others = [f"--ignore={path}" for path in (ROOT / "tests").iterdir() if path.name not in ("models", "benchmarks")]
    environment = {**os.environ, "TEST_BUDGET": full, "TEST_SEED": "7"}
    done = subprocess.run(command + others, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ("test_a_model_is_made_of_its_seed" in done.stdout) == ("test_digits_vqa.py" in done.stdout) == bool(full)
    assert "test_every_family_is_here" in done.stdout
