"""The precision of weights: the base's may be quantized, the adapter's beside them stay float32."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..modules.sharding import is_elsewhere, is_sharded
from . import sites
from .state import state_of


def quantized_tensors(model: nn.Module, projector: nn.Module) -> list[str]:
    """Return the names of a projector's weights that are packed or quantized.

    They are integers or floats of 8 bits; in a quantized model also instances of a tensor subclass that stands for
    such (torchao, quanto), or buffers in a weight's place (GPTQ, AWQ).
    """
    names = [name for name, parameter in sites.projector_parameters(projector).items() if _is_packed(parameter)]
    if getattr(model, "is_quantized", False):
        for name, tensor in sites.projector_tensors(projector).items():
            if isinstance(tensor, nn.Parameter):
                is_packed = type(tensor) is not nn.Parameter and not is_sharded(tensor)
            else:
                # A counter, for one, is no weight.
                is_packed = tensor.ndim > 1 and _is_packed(tensor)
            if is_packed and name not in names:
                names.append(name)
    return names


def with_the_projector_as_it_is(model: nn.Module, projectors: Iterable[nn.Module]) -> str:
    """Return advice on loading a model so that its projector is not quantized."""
    skipped = list(projectors)
    names = [name for name, module in model.named_modules() if any(module is projector for projector in skipped)]
    return (
        "load the model with its projector as it is, for bitsandbytes "
        f"BitsAndBytesConfig(..., llm_int8_skip_modules={[*names, 'lm_head']!r})"
    )


def _is_packed(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or tensor.itemsize == 1


def remember_weights(model: nn.Module) -> None:
    """Hold on to the float32 weights of the adapters, if the model is quantized.

    TRL casts whatever is trainable in such a model to bfloat16, by ``parameter.data = ...``. In bfloat16 a weight near
    1, such as a norm's, doesn't move at a learning rate of 1e-3: a step is less than half the distance to the next
    value. The tensors held share the parameters' memory, so that they cost nothing and follow every optimizer step.
    """
    if getattr(model, "is_quantized", False):
        parameters = {id(p): p for p in _alignment_parameters(model) if p.dtype == torch.float32}
        state_of(model).float32_weights = {key: p.detach() for key, p in parameters.items() if not is_elsewhere(p)}


def restore_weights(model: nn.Module) -> None:
    """Restore the float32 weights of the adapters' trainable parameters, if the model is quantized."""
    if not getattr(model, "is_quantized", False):
        return
    remembered = state_of(model).float32_weights
    for parameter in _alignment_parameters(model):
        is_half = parameter.dtype in (torch.bfloat16, torch.float16)
        if not is_half or not parameter.requires_grad or is_elsewhere(parameter):
            continue
        weights = remembered.get(id(parameter))
        # Unless they have been given other values since: loaded, or cast and trained.
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
