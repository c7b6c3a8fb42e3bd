"""EMMA as a plug-in: instruction-aware visual tokens for vision-language models.

The public interface; everything else may change between releases.
"""

from .alignment import EmmaAlignment
from .collation import InstructionCollator
from .config import EmmaConfig
from .errors import (
    AnalysisError,
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
from .families import MediaLayout, ModelFamily, ProjectorCall, register_family, share_evenly
from .fusion import Fusion, register_fusion
from .fusion.dispatch import KernelUse
from .fusion.packing import Packing
from .instructions.cache import CacheInfo
from .instructions.encoders import InstructionEncoder
from .loading import load_adapter
from .patching import EmmaAdapter, get_adapter, patch_model, unpatch_model
from .version import __version__

__all__ = [
    "AnalysisError",
    "CacheInfo",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "EmmaAdapter",
    "EmmaAlignment",
    "EmmaConfig",
    "EmmaError",
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
    "UnsupportedModelError",
    "__version__",
    "get_adapter",
    "load_adapter",
    "patch_model",
    "register_family",
    "register_fusion",
    "share_evenly",
    "unpatch_model",
]
