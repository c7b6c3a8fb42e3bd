"""A module's parts without what PEFT has put around them, and second instances with other parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import private

#: Between the names of modules in a parameter's path: names in a ParameterDict can't have dots.
SEPARATOR = "/"
_WRAPPED = "base_layer"


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the base's own module inside what PEFT has put around it."""
    while isinstance(inside := module._modules.get(_WRAPPED), nn.Module):
        module = inside
    return module


def base_parts(module: nn.Module, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], nn.Module]]:
    """Yield a module and all below it that are the base's, with their paths."""
    module = unwrapped(module)
    yield path, module
    for name, child in module.named_children():
        yield from base_parts(child, (*path, name))


def is_linear(module: nn.Module) -> bool:
    """Return whether a module has the sizes of a linear layer, whatever its class."""
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    return all(isinstance(size, int) for size in sizes)


def is_quantized(module: Any, value: Tensor) -> bool:
    """Return whether a parameter of a module is quantized, or stands in for others.

    That is, if it has 8 bits or less, is not of float type, is of a quantizer's subclass of tensors, or has another
    shape than its layer's sizes say.
    """
    if not value.is_floating_point() or value.itemsize == 1 or type(value) is not nn.Parameter:
        return True
    return is_linear(module) and value.ndim == 2 and tuple(value.shape) != (module.out_features, module.in_features)


def with_parameters(module: nn.Module, parameters: Mapping[str, Tensor]) -> nn.Module:
    """Return a second instance of a module with other parameters, given by path, in the dtypes of those they replace.

    It shares all else with the module, but has no hooks. What PEFT has put around its layers adds to them here, too.
    Nothing is swapped in the module itself, so that other threads may run it meanwhile.
    """
    inside = module._modules.get(_WRAPPED)
    if isinstance(inside, nn.Module):
        return private.view_of(module, {_WRAPPED: with_parameters(inside, parameters)}, {})
    of_children: dict[str, dict[str, Tensor]] = {}
    replaced: dict[str, Tensor] = {}
    for path, value in parameters.items():
        name, _, rest = path.partition(SEPARATOR)
        if rest:
            of_children.setdefault(name, {})[rest] = value
        else:
            replaced[name] = value.to(module.get_parameter(name).dtype)
    children = {name: with_parameters(module.get_submodule(name), values) for name, values in of_children.items()}
    return private.view_of(module, children, replaced)


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that small weights are trained in beside a base in ``dtype``: float32 or wider."""
    return torch.promote_types(torch.float32, dtype) if dtype.is_floating_point else torch.float32
