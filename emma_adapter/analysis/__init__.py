"""What an adapter does, and whether one could help: weights, maps over the image, information, and a diagnosis.

Functions that return arrays and small frozen dataclasses; the pictures of them are in
:mod:`emma_adapter.analysis.plots`. Needs ``pip install emma_adapter[analysis]``.
"""

from .attending import AttentionMass, MaskStatistics, attention_maps, attention_mass, mask_statistics
from .movement import Comparison, TokenMap, compare, on_image, stitch, token_movement
from .weights import WeightShares, weight_shares

__all__ = [
    "AttentionMass",
    "Comparison",
    "MaskStatistics",
    "TokenMap",
    "WeightShares",
    "attention_maps",
    "attention_mass",
    "compare",
    "mask_statistics",
    "on_image",
    "stitch",
    "token_movement",
    "weight_shares",
]
