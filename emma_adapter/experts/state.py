"""What a model with vision experts knows beside its parameters: one object on the model and the modules with hooks."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from ..errors import PatchError
from ..models.families import ModelFamily
from ..modules.gradient_checkpointing import RecomputationMemory
from .config import VisionExpertsConfig
from .module import VisionExperts
from .routes import Route
from .scopes import Owner

STATE_ATTRIBUTE = "_emma_experts_state"
#: Of the outer model: the submodule that is trained.
MODULE_NAME = "emma_experts"
#: Of a routed block and its MLP: which one it is, counted from the first.
PLACE_ATTRIBUTE = "_emma_experts_place"


class ExpertsState:
    """Copies and pickles of a model carry its experts, never a call."""

    def __init__(self, family: ModelFamily, config: VisionExpertsConfig, module: VisionExperts) -> None:
        self.family = family
        self.config = config
        self.module = module
        #: Whether methods of the inner model tell which images are encoded.
        self.has_feature_methods = True
        #: The expert that every image goes to, because ``train_only`` trains it.
        self.trained: str | None = None
        #: Which parameters ``train_only`` has frozen, None before.
        self.trainable_before: dict[str, bool] | None = None
        self._begin()

    def _begin(self) -> None:
        self.owner = Owner()
        #: By the input of a routed block.
        self.routes: RecomputationMemory[Route] = RecomputationMemory(lambda one, other: one is other)
        #: By pixels: what a block or ``train_only`` forced.
        self.forced: RecomputationMemory[tuple[str | None]] = RecomputationMemory(tuple.__eq__)

    def feature_methods(self, inner: nn.Module) -> dict[str, str]:
        """Return the names of the methods that encode images and videos, by modality, as far as a model has them."""
        names = {modality: self.family.feature_methods.get(modality, "") for modality in self.family.modalities}
        return {modality: name for modality, name in names.items() if hasattr(inner, name)}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("owner", "routes", "forced")}

    def __setstate__(self, kept: dict[str, Any]) -> None:
        vars(self).update(kept)
        self._begin()

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertsState:
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        shared = {"family", "config"}
        kept = {n: v if n in shared else copy.deepcopy(v, memo) for n, v in self.__getstate__().items()}
        twin.__setstate__(kept)
        return twin


def experts_state(model: nn.Module) -> ExpertsState:
    """Return the state of a model with vision experts.

    Raises:
        PatchError: if it has none.
    """
    state = model.__dict__.get(STATE_ATTRIBUTE)
    if not isinstance(state, ExpertsState):
        raise PatchError(
            f"this {type(model).__name__} has no vision experts: add_vision_expert(model, …) or "
            "load_vision_experts(model, …) first"
        )
    return state
