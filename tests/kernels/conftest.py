"""Triton either interprets its kernels, on CPU tensors, or compiles them; which, is settled when it is imported.

``*_interpreted.py`` run where ``TRITON_INTERPRET=1`` was set from the start, everything else where it was not;
``test_interpreter.py`` starts the former.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = ["test_*_interpreted.py"]
if INTERPRETED:
    collect_ignore_glob = ["test_compiled.py", "test_interpreter.py", "test_launches.py", "test_on_gpu.py"]


@pytest.fixture(autouse=True, scope="session")
def _scalars_are_indices():
    """Triton before 3.7 makes numbers of arrays in a way that NumPy 2.4 no longer takes."""
    if not INTERPRETED:
        yield
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, *scope):
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patched
    yield
    interpreter._patch_lang_tensor = patch


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
