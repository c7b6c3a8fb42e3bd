"""In what precision weights are: quantized ones of the base, and the adapter's own beside them, which stay float32."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..modules.sharding import is_elsewhere, is_sharded
from . import sites
from .state import state_of


def quantized_tensors(model: nn.Module, projector: nn.Module) -> list[str]:
    """The names of a projector's weights that are packed or quantized: integers, floats of 8 bits, and in a quantized
    model also a subclass of tensors that stands for such (torchao, quanto), or buffers in a weight's place (GPTQ, AWQ).
    """
    found = [name for name, parameter in sites.projector_parameters(projector).items() if _is_packed(parameter)]
    if getattr(model, "is_quantized", False):
        for name, tensor in sites.projector_tensors(projector).items():
            if isinstance(tensor, nn.Parameter):
                is_packed = type(tensor) is not nn.Parameter and not is_sharded(tensor)
            else:
                # A counter, say, is no weight.
                is_packed = tensor.ndim > 1 and _is_packed(tensor)
            if is_packed and name not in found:
                found.append(name)
    return found


def with_the_projector_as_it_is(model: nn.Module, projectors: Iterable[nn.Module]) -> str:
    """Say how a model is loaded whose projector is not quantized."""
    wanted = list(projectors)
    names = [name for name, module in model.named_modules() if any(module is one for one in wanted)]
    return (
        "load the model with its projector as it is, for bitsandbytes "
        f"BitsAndBytesConfig(..., llm_int8_skip_modules={[*names, 'lm_head']!r})"
    )


def _is_packed(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or tensor.itemsize == 1


def remember_weights(model: nn.Module) -> None:
    """Hold on to the float32 weights of the adapters of a model that is quantized.

    TRL casts whatever is trainable in such a model to bfloat16, by ``parameter.data = ...``. In that a weight near 1,
    as a norm's, doesn't move at a rate of 1e-3: a step is smaller than half of what bfloat16 can tell apart. What is
    held is the memory that the parameters use, so that it costs nothing and follows every optimizer step.
    """
    if getattr(model, "is_quantized", False):
        parameters = {id(p): p for p in _alignment_parameters(model) if p.dtype == torch.float32}
        state_of(model).float32_weights = {key: p.detach() for key, p in parameters.items() if not is_elsewhere(p)}


def restore_weights(model: nn.Module) -> None:
    """Give the adapters' trainable parameters their float32 weights again, if the model is quantized."""
    if not getattr(model, "is_quantized", False):
        return
    held = state_of(model).float32_weights
    for parameter in _alignment_parameters(model):
        half = parameter.dtype in (torch.bfloat16, torch.float16)
        if not half or not parameter.requires_grad or is_elsewhere(parameter):
            continue
        weights = held.get(id(parameter))
        # Not if they were given other values since: loaded, or cast and trained.
        if (
            weights is not None
            and weights.device == parameter.device
            and torch.equal(weights.to(parameter.dtype), parameter.detach())
        ):
            parameter.data = weights
        else:
            parameter.data = parameter.data.float()
    remember_weights(model)


def _alignment_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [p for adapter in state_of(model).adapters.values() for p in adapter.named_parameters().values()]
