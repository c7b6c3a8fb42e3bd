"""What a run is, beside its place in the plan; records of other settings don't count."""

from __future__ import annotations

from dataclasses import dataclass

from ..digits_vqa.ablation.settings import TrainedOutBases


@dataclass(frozen=True)
class PhotoSettings(TrainedOutBases):
    train_scenes: int = 4000
    test_scenes: int = 400
    #: The vision tower is pretrained, and there is no text tower.
    contrastive_steps: int = 0
    base_steps: int = 2000
    decay_steps: int = 400
