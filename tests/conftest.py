from __future__ import annotations

import gc
import os
import sys

# Nothing in the tests may look for a model on the hub, or be slowed down by looking.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Everything here is tiny: more threads only wait for each other, those of numpy and of processes that tests start too.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

from emma_adapter.alignment.fusion.registry import FUSIONS
from tests.support import budget, tiny

torch.set_num_threads(1)
# Of no use here, and what open_clip imports: it asks every module of transformers for its source, which takes seconds.
sys.modules["wandb"] = None  # type: ignore[assignment]
# They hold the benchmarks, not the library: ``make test-benchmarks`` and ``make test-all`` run them.
collect_ignore = budget.budget(["benchmarks"], [])

_HYPOTHESIS = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("everyday", **_HYPOTHESIS, derandomize=True)
settings.register_profile("full", **_HYPOTHESIS, derandomize=False, print_blob=True)
settings.load_profile("full" if budget.FULL else "everyday")


def pytest_report_header():
    if budget.FULL:
        return f"everything, with random draws from {budget.SEED}: make test-all SEED={budget.SEED} draws the same"
    return "the everyday tier; make test-all runs everything"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Leave out what is for the night, and begin with what takes longest, so that no worker ends with it alone."""
    if not budget.FULL:
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("nightly")])
        items[:] = [item for item in items if not item.get_closest_marker("nightly")]
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish():
    """Let no garbage collection look at a million things that stay: some tests collect again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def registry():
    """The fusions there are, which are left as they were."""
    before = dict(FUSIONS)
    yield FUSIONS
    FUSIONS.clear()
    FUSIONS.update(before)


@pytest.fixture
def model():
    return tiny.llava()


@pytest.fixture
def processor():
    return tiny.processor()


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    return tiny.clip_text_folder(tmp_path_factory.mktemp("clip-text"))
