"""Models that adapters are loaded into, and how to tell that a refused load has left one as it was."""

from __future__ import annotations

import copy
import hashlib
from typing import Any

import torch
from torch import nn

from emma_adapter import EmmaConfig, get_adapter, patch_model
from emma_adapter.patching import sites
from tests.support import tiny

FUSIONS = {
    "attention": EmmaConfig(fusion="attention", inner_dim=8, num_heads=2),
    "linear": EmmaConfig(fusion="linear", max_instruction_tokens=6),
    "modulation": EmmaConfig(fusion="modulation", inner_dim=16, num_heads=4),
}
INPUTS = tiny.token_inputs([1, 2, 0])
_HOOKS = (
    *("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs"),
    *("_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks", "_load_state_dict_post_hooks"),
)


def patched(config: EmmaConfig = FUSIONS["attention"], *, seed: int = 1, projector: bool = False) -> nn.Module:
    """A model with an adapter that does something."""
    model = tiny.llava()
    adapter = patch_model(model, config)
    tiny.train_randomly(adapter.alignment, seed=seed)
    if projector:
        adapter.train_only(projector=True)
        for layer in (adapter.projector.linear_1, adapter.projector.linear_2):
            tiny.train_randomly(layer, scale=0.1, seed=seed)
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**INPUTS).logits


def same_values(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Bit for bit, in the same dtypes."""
    return set(one) == set(other) and all(
        (one[name].dtype, one[name].shape) == (other[name].dtype, other[name].shape)
        and torch.equal(_bytes(one[name]), _bytes(other[name]))
        for name in one
    )


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that loading an adapter could change: values, which tensors they are, what is trainable,
    hooks, attributes of every module, and the adapters' own."""
    tensors = model.state_dict(keep_vars=True)
    values = torch.cat([_bytes(value) for value in tensors.values()]).numpy()
    found = {
        "values": hashlib.sha1(values.data).hexdigest(),
        "tensors": [
            (name, id(value), value.dtype, value.shape, value.requires_grad) for name, value in tensors.items()
        ],
        "modules": [
            (
                name,
                id(module),
                frozenset(vars(module)),
                module.training,
                *([*map(id, hooks.values())] for key in _HOOKS if (hooks := vars(module)[key])),
            )
            for name, module in model.named_modules()
        ],
    }
    state = getattr(model, "_emma", None)
    if state is not None:
        found["state"] = (state.active, sorted(vars(state)), state.trainable_before)
        for name, adapter in state.adapters.items():
            found[name] = (
                adapter.config,
                *map(id, (adapter.pipeline, adapter.pipeline.reader, adapter.pipeline.encoder)),
                {name: id(parameter) for name, parameter in adapter.projector_parameters().items()},
            )
            found["kernels"] = [
                (module.config.kernel, module.fusion.dispatch.kernel)
                for module in model.modules()
                if module.__class__.__name__ == "EmmaAlignment"
            ]
    return found


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


class Patched:
    """A patched and trained model, and how to make it as it was after an adapter was loaded into it on purpose."""

    def __init__(self) -> None:
        self.model = patched(seed=7)
        self.values = {name: value.clone() for name, value in get_adapter(self.model).alignment.state_dict().items()}
        logits(self.model)  # transformers adds attributes at the first call
        self.fields = dict(vars(get_adapter(self.model)._state.current))
        self.projector = copy.deepcopy(self.model.model.multi_modal_projector.state_dict())
        self.before = fingerprint(self.model)

    def put_back(self) -> None:
        adapter = get_adapter(self.model)
        for name, value in adapter.alignment.state_dict(keep_vars=True).items():
            value.data = self.values[name].clone()
        vars(adapter._state.current).update(self.fields)
        sites.remove_own_projector(self.model.model.multi_modal_projector, adapter.active)
        for name, value in self.model.model.multi_modal_projector.state_dict().items():
            if "emma" not in name:
                value.copy_(self.projector[name])
