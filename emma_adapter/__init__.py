"""EMMA as a plug-in: instruction-aware visual tokens for vision-language models.

The public interface; everything else may change between releases.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import (
    AnalysisError,
    AutoencoderError,
    CheckpointError,
    ConfigError,
    DataError,
    EmmaError,
    EncoderError,
    InstructionError,
    KernelError,
    PatchError,
    RoutingError,
    ShapeError,
    UnsupportedModelError,
)
from .version import __version__

if TYPE_CHECKING:
    from .alignment import EmmaAlignment
    from .collation import InstructionCollator
    from .config import EmmaConfig
    from .families import MediaLayout, ModelFamily, ProjectorCall, register_family, share_evenly
    from .fusion import Fusion, register_fusion
    from .fusion.dispatch import KernelUse
    from .fusion.packing import Packing
    from .handle import EmmaAdapter, get_adapter
    from .instructions.cache import CacheInfo
    from .instructions.encoders import InstructionEncoder
    from .loading import load_adapter
    from .patching import patch_model, unpatch_model
    from .unified.attaching import unify_model
    from .unified.config import UnifiedConfig
    from .unified.handle import EmmaUnified
    from .unified.loading import load_unified

__all__ = [
    "AnalysisError",
    "AutoencoderError",
    "CacheInfo",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "EmmaAdapter",
    "EmmaAlignment",
    "EmmaConfig",
    "EmmaError",
    "EmmaUnified",
    "EncoderError",
    "Fusion",
    "InstructionCollator",
    "InstructionEncoder",
    "InstructionError",
    "KernelError",
    "KernelUse",
    "MediaLayout",
    "ModelFamily",
    "Packing",
    "PatchError",
    "ProjectorCall",
    "RoutingError",
    "ShapeError",
    "UnifiedConfig",
    "UnsupportedModelError",
    "__version__",
    "get_adapter",
    "load_adapter",
    "load_unified",
    "patch_model",
    "register_family",
    "register_fusion",
    "share_evenly",
    "unify_model",
    "unpatch_model",
]

# Imported when they are first asked for: they need torch, which takes seconds, and ``--help`` doesn't.
_HOMES = {
    "CacheInfo": "instructions.cache",
    "EmmaAdapter": "handle",
    "EmmaAlignment": "alignment",
    "EmmaConfig": "config",
    "EmmaUnified": "unified.handle",
    "Fusion": "fusion",
    "InstructionCollator": "collation",
    "InstructionEncoder": "instructions.encoders",
    "KernelUse": "fusion.dispatch",
    "MediaLayout": "families",
    "ModelFamily": "families",
    "Packing": "fusion.packing",
    "ProjectorCall": "families",
    "UnifiedConfig": "unified.config",
    "get_adapter": "handle",
    "load_adapter": "loading",
    "load_unified": "unified.loading",
    "patch_model": "patching",
    "register_family": "families",
    "register_fusion": "fusion",
    "share_evenly": "families",
    "unify_model": "unified.attaching",
    "unpatch_model": "patching",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        globals()[name] = found = getattr(import_module(f".{_HOMES[name]}", __name__), name)
        return found
    if any(home.split(".")[0] == name for home in _HOMES.values()):
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
