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
    from .adapter.handle import EmmaAdapter, get_adapter
    from .adapter.loading import load_adapter
    from .adapter.patch import patch_model, unpatch_model
    from .alignment.config import EmmaConfig
    from .alignment.fusion import Fusion, register_fusion
    from .alignment.fusion.dispatch import KernelUse
    from .alignment.fusion.packed_images import Packing
    from .alignment.module import EmmaAlignment
    from .data.collation import InstructionCollator
    from .experts.attaching import add_vision_expert
    from .experts.handle import EmmaVisionExperts
    from .experts.loading import load_vision_experts
    from .experts.scopes import RoutedImage, RoutingReport
    from .instructions.cache import CacheInfo
    from .instructions.encoders import InstructionEncoder
    from .models.families import MediaLayout, ModelFamily, ProjectorCall, share_evenly
    from .models.registry import register_family
    from .models.token_orders import block_order, window_order
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
    "EmmaVisionExperts",
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
    "RoutedImage",
    "RoutingError",
    "RoutingReport",
    "ShapeError",
    "UnifiedConfig",
    "UnsupportedModelError",
    "__version__",
    "add_vision_expert",
    "block_order",
    "get_adapter",
    "load_adapter",
    "load_unified",
    "load_vision_experts",
    "patch_model",
    "register_family",
    "register_fusion",
    "share_evenly",
    "unify_model",
    "unpatch_model",
    "window_order",
]

# Imported when they are first asked for: they need torch, which takes seconds, and ``--help`` doesn't.
_HOMES = {
    "CacheInfo": "instructions.cache",
    "EmmaAdapter": "adapter.handle",
    "EmmaAlignment": "alignment.module",
    "EmmaConfig": "alignment.config",
    "EmmaUnified": "unified.handle",
    "EmmaVisionExperts": "experts.handle",
    "Fusion": "alignment.fusion",
    "InstructionCollator": "data.collation",
    "InstructionEncoder": "instructions.encoders",
    "KernelUse": "alignment.fusion.dispatch",
    "MediaLayout": "models.families",
    "ModelFamily": "models.families",
    "Packing": "alignment.fusion.packed_images",
    "ProjectorCall": "models.families",
    "RoutedImage": "experts.scopes",
    "RoutingReport": "experts.scopes",
    "UnifiedConfig": "unified.config",
    "add_vision_expert": "experts.attaching",
    "block_order": "models.token_orders",
    "get_adapter": "adapter.handle",
    "load_adapter": "adapter.loading",
    "load_unified": "unified.loading",
    "load_vision_experts": "experts.loading",
    "patch_model": "adapter.patch",
    "register_family": "models.registry",
    "register_fusion": "alignment.fusion",
    "share_evenly": "models.families",
    "unify_model": "unified.attaching",
    "unpatch_model": "adapter.patch",
    "window_order": "models.token_orders",
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
