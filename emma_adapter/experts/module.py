"""The experts of a model and their router: what is trained and saved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import PatchError
from ..modules import sharding
from ..modules.views import SEPARATOR, wide, with_parameters

#: The router's logit of an expert at the start, that of the original being 0: so low that no image is taken.
START = -2.0
_WEIGHT, _BIAS = "weight", "bias"


class VisionExperts(nn.Module):
    """Copies of MLPs, and a linear router.

    All are entries of flat ``ParameterDict``s: PEFT, which wraps linear layers by the end of their names, finds none.
    Values are float32 at least: at the paper's learning rate of 4e-6, bfloat16 would swallow an optimizer's steps.
    """

    def __init__(self) -> None:
        super().__init__()
        #: ``<expert>/<number of the routed block>/<path in its MLP>``.
        self.experts = nn.ParameterDict()
        #: ``<expert>/weight`` ``[D]`` and ``<expert>/bias`` ``[1]``. The original's logit is 0.
        self.router = nn.ParameterDict()

    def add(self, name: str, mlps: Sequence[Mapping[str, Tensor]], width: int) -> None:
        """Add an expert that is a copy, and that the router takes for no image.

        Args:
            name: of the expert.
            mlps: the parameters of each routed block's MLP, by path.
            width: D of the tokens.
        """
        for key, value in expert_tensors(name, mlps).items():
            self.experts[key] = nn.Parameter(value.detach().clone().to(wide(value.dtype)), requires_grad=True)
        device = next(iter(mlps[0].values())).device
        self.router[f"{name}{SEPARATOR}{_WEIGHT}"] = nn.Parameter(torch.zeros(width, device=device))
        self.router[f"{name}{SEPARATOR}{_BIAS}"] = nn.Parameter(torch.full((1,), START, device=device))

    def remove(self, name: str) -> None:
        """Remove an expert, and what the router knows of it."""
        for parameters in (self.experts, self.router):
            for key in [key for key in parameters if key.startswith(name + SEPARATOR)]:
                del parameters[key]

    def of(self, name: str) -> list[nn.Parameter]:
        """Return the parameters of one expert, without the router's."""
        return [value for key, value in self.experts.items() if key.startswith(name + SEPARATOR)]

    def logits(self, names: Sequence[str], pooled: Tensor, router: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return ``[images, 1 + experts]``, float32: first that of the original, which is 0.

        Args:
            names: of the experts.
            pooled: the mean of each image's tokens ``[images, D]``, float32.
            router: what stands for the router's parameters; default: they themselves.
        """
        own: Any = self.router if router is None else router
        weights, biases = ([own[f"{name}{SEPARATOR}{part}"].float() for name in names] for part in (_WEIGHT, _BIAS))
        require_here(weights)
        with torch.autocast(pooled.device.type, enabled=False):
            features = F.layer_norm(pooled.to(weights[0].device), pooled.shape[-1:])
            found = features @ torch.stack(weights).mT + torch.cat(biases)
        return F.pad(found, (1, 0))

    def compute(self, name: str, place: int, mlp: nn.Module, tokens: Tensor) -> Tensor:
        """Return what an expert makes of tokens ``[..., D]`` in place of the MLP of a routed block.

        Args:
            name: of the expert.
            place: number of the routed block.
            mlp: its MLP.
            tokens: that the MLP was given.
        """
        before = f"{name}{SEPARATOR}{place}{SEPARATOR}"
        own = {key.removeprefix(before): value for key, value in self.experts.items() if key.startswith(before)}
        require_here(own.values())
        device = next(iter(own.values())).device
        made: Tensor = with_parameters(mlp, own)(tokens.to(device))
        return made


def expert_tensors(name: str, mlps: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the parameters of each routed block's MLP, by the names that an expert's copies of them have."""
    return {
        SEPARATOR.join((name, str(number), path)): value
        for number, mlp in enumerate(mlps)
        for path, value in mlp.items()
    }


def expected_tensors(names: Sequence[str], mlps: Sequence[Mapping[str, Tensor]], width: int) -> dict[str, Tensor]:
    """Return tensors of the names and shapes that the ``state_dict`` of experts has, without a new value."""
    router = {_WEIGHT: torch.empty(width, device="meta"), _BIAS: torch.empty(1, device="meta")}
    return {
        **{f"experts.{key}": value for name in names for key, value in expert_tensors(name, mlps).items()},
        **{f"router.{name}{SEPARATOR}{part}": value for name in names for part, value in router.items()},
    }


def require_here(parameters: Iterable[Tensor]) -> None:
    """Check that parameters of experts or the router are whole in this process.

    Raises:
        PatchError: if they are sharded or offloaded.
    """
    if any(sharding.is_elsewhere(parameter) for parameter in parameters):
        raise PatchError(
            "weights of vision experts are sharded (FSDP, ZeRO-3) or offloaded, and are used outside of the calls that "
            "gather them: wrap the model in DistributedDataParallel, or leave emma_experts out of what is offloaded"
        )
