"""The package as a checkout has it, where it isn't installed."""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def prepare() -> None:
    """Make families of models and the tests' helpers importable.

    What an installation does: ``integrations/`` becomes ``emma_adapter.integrations``, and each family is known by its
    model type, which ``pyproject.toml`` names.
    """
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    import emma_adapter
    from emma_adapter.models import registry

    name = "emma_adapter.integrations"
    try:
        importlib.import_module(name)
    except ImportError:
        package = types.ModuleType(name)
        package.__path__ = [str(ROOT / "integrations")]
        sys.modules[name] = package
    if "llava" not in registry.family_names():
        from emma_adapter.integrations.llava import LlavaFamily  # type: ignore[import-not-found, unused-ignore]

        emma_adapter.register_family(LlavaFamily())
