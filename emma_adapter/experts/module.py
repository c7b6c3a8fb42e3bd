"""VisionExperts: the trained and saved parameters of a model's experts and their router."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import PatchError
from ..modules import sharding
from ..modules.views import SEPARATOR, wide, with_parameters

#: An expert's logit at the start: with the original's of 0, too low for it to take any image.
START = -2.0
_WEIGHT, _BIAS = "weight", "bias"


class VisionExperts(nn.Module):
    """Copies of MLPs, and a linear router.

    All are in flat ``ParameterDict``s, in which PEFT, which wraps linear layers by the end of their names, finds none.
    They are in float32 at least: at the paper's learning rate of 4e-6, an optimizer's steps would vanish in bfloat16.
    """

    def __init__(self) -> None:
        super().__init__()
        #: ``<expert>/<number of the routed block>/<path in its MLP>``.
        self.experts = nn.ParameterDict()
        #: ``<expert>/weight`` ``[D]`` and ``<expert>/bias`` ``[1]``. The original's logit is 0.
        self.router = nn.ParameterDict()

    def add(self, name: str, mlps: Sequence[Mapping[str, Tensor]], width: int) -> None:
        """Add an expert that is a copy of the original, and to which the router sends no image yet.

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
        """Remove an expert and its parameters of the router."""
        for parameters in (self.experts, self.router):
            for key in [key for key in parameters if key.startswith(name + SEPARATOR)]:
                del parameters[key]

    def of(self, name: str) -> list[nn.Parameter]:
        """Return the parameters of one expert, without the router's."""
        return [value for key, value in self.experts.items() if key.startswith(name + SEPARATOR)]

    def logits(self, names: Sequence[str], pooled: Tensor, router: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the logits ``[images, 1 + experts]`` in float32; the original's come first, and are 0.

        Args:
            names: of the experts.
            pooled: the mean of each image's tokens ``[images, D]``, float32.
            router: tensors to use in place of the router's parameters; default: the parameters.
        """
        tensors: Any = self.router if router is None else router
        weights, biases = ([tensors[f"{name}{SEPARATOR}{part}"].float() for name in names] for part in (_WEIGHT, _BIAS))
        require_here(weights)
        with torch.autocast(pooled.device.type, enabled=False):
            features = F.layer_norm(pooled.to(weights[0].device), pooled.shape[-1:])
            expert_logits = features @ torch.stack(weights).mT + torch.cat(biases)
        return F.pad(expert_logits, (1, 0))

    def compute(self, name: str, place: int, mlp: nn.Module, tokens: Tensor) -> Tensor:
        """Return an expert's output for tokens ``[..., D]``, in place of that of a routed block's MLP.

        Args:
            name: of the expert.
            place: number of the routed block.
            mlp: its MLP.
            tokens: the input of the MLP.
        """
        prefix = f"{name}{SEPARATOR}{place}{SEPARATOR}"
        parameters = {key.removeprefix(prefix): value for key, value in self.experts.items() if key.startswith(prefix)}
        require_here(parameters.values())
        device = next(iter(parameters.values())).device
        output: Tensor = with_parameters(mlp, parameters)(tokens.to(device))
        return output


def expert_tensors(name: str, mlps: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the parameters of each routed block's MLP, by the names of an expert's copies of them."""
    return {
        SEPARATOR.join((name, str(number), path)): value
        for number, mlp in enumerate(mlps)
        for path, value in mlp.items()
    }


def expected_tensors(names: Sequence[str], mlps: Sequence[Mapping[str, Tensor]], width: int) -> dict[str, Tensor]:
    """Return tensors with the names and shapes of the experts' ``state_dict``, without allocating any memory."""
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
