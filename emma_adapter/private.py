"""What this library uses of other libraries that is private there, or changes between their releases.

Each function names its owner, and the test that fails first when the owner changes it.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import nn

#: What transformers has called the cache argument: ``past_key_values`` before 5.24, and until 5.40 as an alias.
_CACHE_NAMES = ("cache", "past_key_values")


def is_cache(value: Any) -> bool:
    """Return whether an argument of a call is a cache of transformers, whatever it is called.

    Held by ``test_private.py::test_a_cache_is_found_by_what_it_is``.
    """
    # Not isinstance: transformers isn't imported, and wrappers of caches have the method too.
    return callable(getattr(value, "get_seq_length", None)) and not isinstance(value, (type, nn.Module))


def cache_names_to_bridge(kind: type[nn.Module]) -> dict[str, str]:
    """Return the names that transformers may pass a cache by and this class's ``forward`` doesn't take, each with the
    name that it does take.

    transformers 5.24 passes ``cache``, which classes written for older releases, as LLaVA's own, don't know; what they
    call their base class with, it understands.

    Held by ``test_private.py::test_generate_passes_a_cache_by_a_name_that_is_known``.
    """
    parameters = inspect.signature(kind.forward).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return {}
    known = next((name for name in _CACHE_NAMES if name in parameters), None)
    return {} if known is None else {name: known for name in _CACHE_NAMES if name not in parameters}


def has_compiled_code() -> bool:
    """Whether ``torch.compile`` has compiled anything in this process.

    Reads ``torch._dynamo.convert_frame.output_codes``, PyTorch's list of what it has compiled. True in a release that
    has none. Held by ``tests/test_compiled.py::test_what_was_compiled_is_kept_where_nothing_is_patched``.
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
