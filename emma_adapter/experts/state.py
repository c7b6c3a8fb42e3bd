"""The state of a model with vision experts beside its parameters: one object on it and on the modules with hooks."""

from __future__ import annotations

import copy
import operator
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
#: Name of the outer model's submodule that holds the experts' parameters.
MODULE_NAME = "emma_experts"
#: On a routed block and its MLP: its number, counted from the first.
PLACE_ATTRIBUTE = "_emma_experts_place"


class ExpertsState:
    """The state of a model with vision experts. Copies and pickles of it carry no running call."""

    def __init__(self, family: ModelFamily, config: VisionExpertsConfig, module: VisionExperts) -> None:
        self.family = family
        self.config = config
        self.module = module
        #: Whether the inner model has methods that encode images.
        self.has_feature_methods = True
        #: The expert that every image goes to, because ``train_only`` trains it.
        self.trained: str | None = None
        #: Which parameters were trainable before ``train_only``, by name; None if it wasn't called.
        self.trainable_before: dict[str, bool] | None = None
        self._begin()

    def _begin(self) -> None:
        self.owner = Owner()
        #: By the input of a routed block.
        self.routes: RecomputationMemory[Route] = RecomputationMemory(operator.is_)
        #: By pixels: the choice that a ``routed`` block or ``train_only`` forced.
        self.forced: RecomputationMemory[tuple[str | None]] = RecomputationMemory(tuple.__eq__)

    def feature_methods(self, inner: nn.Module) -> dict[str, str]:
        """Return the names of the model's methods that encode images and videos, by modality."""
        names = {modality: self.family.feature_methods.get(modality, "") for modality in self.family.modalities}
        return {modality: name for modality, name in names.items() if hasattr(inner, name)}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("owner", "routes", "forced")}

    def __setstate__(self, saved: dict[str, Any]) -> None:
        vars(self).update(saved)
        self._begin()

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertsState:
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        shared = {"family", "config"}
        saved = {n: v if n in shared else copy.deepcopy(v, memo) for n, v in self.__getstate__().items()}
        twin.__setstate__(saved)
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
