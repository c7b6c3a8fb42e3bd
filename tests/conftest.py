from __future__ import annotations

import os

# Nothing in the tests may look for a model on the hub, or be slowed down by looking.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import HealthCheck, settings

from emma_adapter.alignment.fusion.registry import FUSIONS
from tests.support import tiny

# Everything here is tiny: more threads only wait for each other.
torch.set_num_threads(1)

settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
settings.load_profile("default")


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
