"""Fusions: how an instruction enters visual tokens. Importing this package registers the built-in ones."""

from .attention import AttentionFusion
from .base import Fusion, fusion_class, register_fusion
from .linear import LinearFusion
from .moda import ModaFusion
from .modulation import ModulationFusion
from .registry import fusion_names

__all__ = [
    "AttentionFusion",
    "Fusion",
    "LinearFusion",
    "ModaFusion",
    "ModulationFusion",
    "fusion_class",
    "fusion_names",
    "register_fusion",
]
