"""Analysis of what an adapter does, and whether one could help: weights, maps, information, and a diagnosis.

Functions return arrays and small frozen dataclasses, which :mod:`emma_adapter.analysis.plots` draws. Needs
``pip install "emma_adapter[analysis]"``: scikit-learn for ``probe`` and ``diagnose``, matplotlib for the plots.
"""

from .attending import AttentionMass, MaskStatistics, attention_maps, attention_mass, mask_statistics
from .diagnosis import Asked, Diagnosis, diagnose
from .information import InformationGain, MutualInformation, information_gain, mutual_information
from .movement import Comparison, TokenMap, compare, on_image, stitch, token_movement
from .pairs import PairDistances, pair_distances
from .probes import Probe, probe
from .weights import WeightShares, weight_shares

__all__ = [
    "Asked",
    "AttentionMass",
    "Comparison",
    "Diagnosis",
    "InformationGain",
    "MaskStatistics",
    "MutualInformation",
    "PairDistances",
    "Probe",
    "TokenMap",
    "WeightShares",
    "attention_maps",
    "attention_mass",
    "compare",
    "diagnose",
    "information_gain",
    "mask_statistics",
    "mutual_information",
    "on_image",
    "pair_distances",
    "probe",
    "stitch",
    "token_movement",
    "weight_shares",
]
