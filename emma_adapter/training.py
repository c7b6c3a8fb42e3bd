"""What is trainable, and in which parameter groups."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .alignment import EmmaAlignment
from .errors import PatchError
from .hooks import remove_hooks
from .state import ALIGNMENT_NAME, STATE_ATTRIBUTE, state_of


def projector_of(model: nn.Module) -> nn.Module:
    family = state_of(model).family
    return family.projector(family.inner(model))


def alignment_of(model: nn.Module) -> EmmaAlignment:
    return projector_of(model).get_submodule(ALIGNMENT_NAME)  # type: ignore[return-value]


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """The numbers in the adapter, and in the whole model with it."""
    own = sum(parameter.numel() for parameter in alignment_of(model).parameters())
    return own, sum(parameter.numel() for parameter in model.parameters())


def projector_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return projector_tensors(projector_of(model))


def projector_tensors(projector: nn.Module) -> dict[str, nn.Parameter]:
    """The projector's own parameters by name, without the adapter's."""
    return {
        name: parameter for name, parameter in projector.named_parameters() if not name.startswith(f"{ALIGNMENT_NAME}.")
    }


def train_only(model: nn.Module, *, projector: bool) -> None:
    """Freeze everything but the adapter, and optionally the projector."""
    state = state_of(model)
    if projector and any(".base_layer." in f".{name}" for name in projector_parameters(model)):
        raise PatchError(
            "the projector is wrapped by another adapter (LoRA?), so that it can't be saved as one; merge that "
            "adapter first, or train_only() without projector=True"
        )
    if state.trainable_before is None:
        adapter = {id(parameter) for parameter in alignment_of(model).parameters()}
        state.trainable_before = {n: p.requires_grad for n, p in model.named_parameters() if id(p) not in adapter}
    model.requires_grad_(False)
    alignment_of(model).requires_grad_(True)
    if projector:
        keep_original_projector(model)
        for parameter in projector_parameters(model).values():
            parameter.requires_grad_(True)


def undo_train_only(model: nn.Module) -> None:
    """Make trainable again what was, and give the projector its original values."""
    reset_projector(model)
    before = state_of(model).trainable_before or {}
    for name, parameter in model.named_parameters():
        if name in before:
            parameter.requires_grad_(before[name])


def parameter_groups(
    model: nn.Module, lr: float, *, projector_lr: float | None, weight_decay: float
) -> list[dict[str, Any]]:
    """One group for the adapter, and one for the projector if it is trained."""
    adapter = [parameter for parameter in alignment_of(model).parameters() if parameter.requires_grad]
    projector = [parameter for parameter in projector_parameters(model).values() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [{"params": adapter, "lr": lr, "weight_decay": weight_decay}]
    if projector:
        rate = lr if projector_lr is None else projector_lr
        groups.append({"params": projector, "lr": rate, "weight_decay": weight_decay})
    return groups


def keep_original_projector(model: nn.Module) -> None:
    """Remember the projector as it is, so that ``disabled()`` and ``unpatch_model`` can go back to it."""
    state = state_of(model)
    if state.original_projector is not None:
        return
    original = copy.deepcopy(projector_of(model))
    remove_hooks(original)
    delattr(original, ALIGNMENT_NAME)
    delattr(original, STATE_ATTRIBUTE)
    state.original_projector = original.requires_grad_(False)


def trained_projector(model: nn.Module) -> dict[str, Tensor]:
    """The projector's tensors if it belongs to the adapter; else none."""
    if state_of(model).original_projector is None:
        return {}
    return {name: parameter.detach() for name, parameter in projector_parameters(model).items()}


def assign(model: nn.Module, alignment: Mapping[str, Tensor], projector: Mapping[str, Tensor]) -> None:
    """Give adapter and projector these values. The adapter takes their dtype too: it is saved as it was used."""
    own = alignment_of(model).state_dict(keep_vars=True)
    for name, value in alignment.items():
        own[name].data = value.to(own[name].device)
    parameters = projector_parameters(model)
    for name, value in projector.items():
        parameters[name].data.copy_(value)


def reset_projector(model: nn.Module) -> None:
    """Give the projector its original values again; it may go on being trained."""
    original = state_of(model).original_projector
    if original is not None:
        parameters = projector_parameters(model)
        for name, value in original.named_parameters():
            parameters[name].data.copy_(value)
