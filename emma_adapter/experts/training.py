"""Training vision experts: one expert by the language model's loss, or the router by labels."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError, DataError, UnsupportedModelError
from ..messages import listed, shown
from ..modules import sharding, trainability
from .config import ORIGINAL
from .hooks import pooled_features
from .module import require_here
from .state import ExpertsState, experts_state


def train_only(model: nn.Module, expert: str | None, *, router: bool) -> None:
    """Freeze everything but one expert, to which all images then go, or everything but the router.

    Raises:
        ConfigError: if neither or both are named, or there is no such expert.
    """
    state = experts_state(model)
    if (expert is None) != router:
        raise ConfigError('train one thing at a time: train_only("…") an expert, or train_only(router=True)')
    if expert is not None:
        require_expert(state, expert)
    if state.trainable_before is None:
        state.trainable_before = trainability.trainable_flags(model)
    model.requires_grad_(False)
    trained_parameters = state.module.router.values() if expert is None else state.module.of(expert)
    for parameter in trained_parameters:
        parameter.requires_grad_(True)
    state.trained = expert


def unfreeze(model: nn.Module) -> None:
    """Make trainable again what :func:`train_only` has frozen, and let the router choose again."""
    state = experts_state(model)
    trainability.unfreeze(model, state.trainable_before)
    state.trainable_before = state.trained = None


def require_expert(state: ExpertsState, name: object) -> None:
    """Check that there is an expert of this name.

    Raises:
        ConfigError: if there is none.
    """
    if name not in state.config.experts:
        raise ConfigError(f"there is no expert {shown(name)}; there are {listed(state.config.experts)}")


def router_loss(model: nn.Module, labels: Sequence[str], inputs: Mapping[str, Any]) -> Tensor:
    """Return the cross-entropy of where images should go, a scalar in float32.

    Args:
        model: with experts.
        labels: for each image, then for each video, the name of an expert or ``"original"``.
        inputs: what the processor makes; only pixels and their sizes are used.

    Raises:
        ConfigError: if a label is neither.
        DataError: if there are no pixels, or not as many labels as images.
        PatchError: if the router is sharded or offloaded.
        UnsupportedModelError: if the model has no method that encodes images.
    """
    state = experts_state(model)
    names = (ORIGINAL, *state.config.experts)
    if unknown := sorted({shown(label) for label in labels if label not in names}):
        raise ConfigError(f"labels are names of {list(names)}; got {', '.join(unknown[:5])}")
    inner = state.family.inner(model)
    methods, arguments = state.feature_methods(inner), state.family.pixel_arguments
    modalities = [modality for modality in state.family.modalities if inputs.get(arguments[modality]) is not None]
    if modalities and not methods:
        raise UnsupportedModelError(
            f"{type(inner).__name__} has no get_image_features, which the router's loss is computed with: use a model "
            "of transformers' own classes"
        )
    router = dict(state.module.router.items())
    # Checked now, since a tower that is sharded with it couldn't be run.
    require_here(router.values())
    pooled = []
    for modality in modalities:
        method = getattr(inner, methods[modality])
        passed_names = _argument_names(method, state) & set(inputs) - set(arguments.values())
        sizes = {name: inputs[name] for name in passed_names}
        pooled.append(pooled_features(method, inputs[arguments[modality]], **sizes))
    count = sum(map(len, pooled))
    if not count or count != len(labels):
        raise DataError(
            f"there are {len(labels)} labels for {count} images and videos: pass pixel_values and all else that the "
            "model's processor returns, and a label for each, those of images first"
        )
    if sharding.are_many_processes():
        router = sharding.averaged_over_processes(router)
    logits = state.module.logits(state.config.experts, torch.cat(pooled), router)
    target = torch.tensor([names.index(label) for label in labels], device=logits.device)
    return F.cross_entropy(logits, target)


def _argument_names(method: Callable[..., Any], state: ExpertsState) -> set[str]:
    """Return the names of an image-encoding method's arguments. Some releases take the sizes as ``**kwargs``."""
    names, sizes = set(inspect.signature(method).parameters), set(state.family.size_arguments)
    return names if names & sizes else names | sizes


def parameter_groups(model: nn.Module, lr: float, router_lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Return an optimizer's groups of trainable parameters: the experts' matrices, their vectors, and the router.

    Only the matrices decay.

    Raises:
        ConfigError: if a rate is not a number, or negative.
    """
    for name, rate in (("lr", lr), ("router_lr", router_lr), ("weight_decay", weight_decay)):
        trainability.check_rate(name, rate)
    module = experts_state(model).module
    return [
        *trainability.parameter_groups(module.experts.values(), lr, weight_decay),
        *trainability.parameter_groups(module.router.values(), router_lr, 0.0),
    ]
