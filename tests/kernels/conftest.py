"""Triton either interprets its kernels, on CPU tensors, or compiles them; which, is settled when it is imported.

``*_interpreted.py`` run where ``TRITON_INTERPRET=1`` was set from the start, everything else where it was not;
``test_interpreter.py`` starts the former.
"""

from __future__ import annotations

import os
from contextlib import nullcontext

import pytest
import torch

from tests.kernels.interpreter import scalars_as_indices

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = ["test_*_interpreted.py"]
if INTERPRETED:
    collect_ignore_glob = ["test_compiled.py", "test_interpreter.py", "test_*launches.py", "test_on_gpu.py"]


@pytest.fixture(autouse=True, scope="session")
def _scalars_are_indices():
    with scalars_as_indices() if INTERPRETED else nullcontext():
        yield


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Memory that nobody has written yet holds NaN, so that reading it shows."""

    def poison(allocate):
        def poisoned(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            if tensor.is_floating_point() and not tensor.is_meta:
                tensor.detach().fill_(float("nan"))
            return tensor

        return poisoned

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))
