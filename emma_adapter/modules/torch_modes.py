"""Protection from what a caller may have switched on around a call to this library."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def undisturbed() -> Iterator[None]:
    """Let the block make tensors as PyTorch does by default: in float32, on the CPU, and such that can be trained.

    An adapter that is made under ``torch.inference_mode()``, ``torch.set_default_dtype(torch.bfloat16)`` or
    ``with torch.device("meta")`` is to be the same as any other.
    """
    dtype = torch.get_default_dtype()
    if dtype != torch.float32:
        torch.set_default_dtype(torch.float32)
    try:
        with torch.inference_mode(False), torch.device("cpu"):
            yield
    finally:
        if dtype != torch.float32:
            torch.set_default_dtype(dtype)
