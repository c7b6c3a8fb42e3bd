"""What this library takes from other libraries that is not their public interface, each in one small function."""

from __future__ import annotations

import sys
from typing import Any

import torch


def has_compiled_code() -> bool:
    """Whether ``torch.compile`` has compiled anything in this process.

    Reads ``torch._dynamo.convert_frame.output_codes``, PyTorch's list of what it has compiled. True in a release that
    has none. Held by ``tests/test_wrapped.py::test_what_was_compiled_is_kept_where_nothing_is_patched``.
    """
    frames: Any = sys.modules.get("torch._dynamo.convert_frame")
    return frames is not None and bool(getattr(getattr(frames, "output_codes", None), "seen", True))


def forget_compiled_code() -> None:
    """Have ``torch.compile`` compile again what it is asked for from now on.

    It checks nearly everything that its code depends on at each call, but hooks it leaves out for speed
    (``torch._dynamo.config.skip_nnmodule_hook_guards``): code made before a model had hooks would go on without them.
    """
    if has_compiled_code():
        torch.compiler.reset()
