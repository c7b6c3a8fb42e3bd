"""Fusions: how an instruction enters visual tokens. Importing this package registers the built-in ones."""

from .attention import AttentionFusion
from .linear import LinearFusion
from .modulation import ModulationFusion
from .registry import Fusion, fusion_class, fusion_names, register_fusion

__all__ = [
    "AttentionFusion",
    "Fusion",
    "LinearFusion",
    "ModulationFusion",
    "fusion_class",
    "fusion_names",
    "register_fusion",
]
