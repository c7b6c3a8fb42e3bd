"""What a run is, beside its place in the plan; records of other settings don't count."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Of every study."""

    steps: int = 700
    batch_size: int = 32
    train_scenes: int = 12_000
    test_scenes: int = 500
    #: Of the towers of a base checkpoint.
    contrastive_steps: int = 600


@dataclass(frozen=True)
class ShortBases(Settings):
    """Base checkpoints that pool to one token are trained for so many steps; others go on from there."""

    language_steps: int = 2000
    pooled_steps: int = 600


@dataclass(frozen=True)
class TrainedOutBases(Settings):
    """Each base checkpoint is trained until it stops getting better."""

    #: At a constant rate, at most.
    base_steps: int = 6000
    decay_steps: int = 800
    #: Layers of the language model.
    language_layers: int = 2
