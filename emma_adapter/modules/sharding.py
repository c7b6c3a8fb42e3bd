"""Weights that aren't whole in this process: sharded over processes, or offloaded, and how they are gathered."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PatchError
from .private import accelerate_hooks


def is_sharded(tensor: Tensor) -> bool:
    """Return whether ``tensor`` is a ``DTensor``, of which this process may hold only a part."""
    # Importing it takes seconds, and whoever holds one has imported it.
    module: Any = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_partitioned(tensor: Tensor) -> bool:
    """Return whether DeepSpeed ZeRO-3 holds the values of ``tensor`` and left it empty here."""
    return hasattr(tensor, "ds_id") and tensor.numel() == 0


def is_elsewhere(tensor: Tensor) -> bool:
    return tensor.is_meta or is_sharded(tensor) or is_partitioned(tensor)


def is_fully_sharded(model: nn.Module) -> bool:
    """Return whether ``fully_shard`` (FSDP2) or ``FullyShardedDataParallel`` was applied to any part of the model."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not torch.distributed.is_available():
        return False
    return any(isinstance(module, (fsdp.FSDPModule, fsdp.FullyShardedDataParallel)) for module in model.modules())


def execution_device(module: nn.Module) -> torch.device | None:
    """Return where accelerate's hooks run a module, or None if it has none.

    Its inputs may come from elsewhere, and its weights lie elsewhere.
    """
    for part in module.modules():
        for hook in accelerate_hooks(part):
            device = getattr(hook, "execution_device", None)
            if device is not None:
                return torch.device(device)
    return None


def computing_device(module: nn.Module) -> torch.device:
    """Return where a module computes: where its first parameter is, or where accelerate brings it."""
    device = next(module.parameters()).device
    return device if device.type != "meta" else execution_device(module) or device


def gather(
    model: nn.Module, tensors: Mapping[str, Tensor], gathered: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return the tensors whole, on the CPU.

    Args:
        model: the model that they are part of.
        tensors: the model's own objects (``state_dict(keep_vars=True)``), under any names.
        gathered: a state dict of the model that was gathered already. Without it, sharded tensors are gathered here,
            in which every process that holds a part must take part.

    Raises:
        PatchError: if a tensor can't be gathered from here.
    """
    elsewhere = {id(value) for value in tensors.values() if is_elsewhere(value)}
    copies: dict[int, Tensor] = {}
    if elsewhere and gathered is not None:
        values = model.state_dict(keep_vars=True).items()
        copies = {id(value): gathered[name] for name, value in values if id(value) in elsewhere and name in gathered}
    elif any(tensor.is_meta for tensor in tensors.values()):
        copies = _offloaded(model, elsewhere)
    whole = {name: copies.get(id(value), value) for name, value in tensors.items()}
    if gathered is None:
        whole = {name: _full(value) for name, value in whole.items()}
    if missing := sorted(name for name, value in whole.items() if is_elsewhere(value)):
        raise PatchError(
            f"the adapter's weights {missing} are not in this process, so that there is nothing to save. DeepSpeed "
            "ZeRO-3 and FSDP gather them: adapter.save_pretrained(folder, state_dict=accelerator.get_state_dict(...)), "
            "as in docs/distributed.md. Offloaded by other hooks than accelerate's: take those off first"
        )
    return {name: value.detach().cpu().contiguous() for name, value in whole.items()}


def _offloaded(model: nn.Module, placeholder_ids: set[int]) -> dict[int, Tensor]:
    """Return copies of offloaded tensors, by the identity of what stands in for them."""
    from accelerate.utils import align_module_device, has_offloaded_params

    copies: dict[int, Tensor] = {}
    for module in model.modules():
        if not has_offloaded_params(module):
            continue
        tensors = module.state_dict(keep_vars=True).items()
        placeholders = {name: tensor for name, tensor in tensors if id(tensor) in placeholder_ids}
        if not placeholders:
            continue
        with align_module_device(module, torch.device("cpu")):
            values = module.state_dict()
            copies |= {id(p): values[name].clone() for name, p in placeholders.items() if not values[name].is_meta}
    return copies


def _full(tensor: Tensor) -> Tensor:
    sharded: Any = tensor
    return sharded.full_tensor() if is_sharded(tensor) else tensor


def averaged_over_processes(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors with the parameters' values, whose gradients reach the parameters averaged over all processes.

    For losses outside of the call that DistributedDataParallel wraps, which averages nothing else. Every process must
    run as many backward passes.
    """
    return dict(zip(parameters, _Averaged.apply(*parameters.values()), strict=True))


class _Averaged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *values: Tensor) -> tuple[Tensor, ...]:
        return tuple(value.view_as(value) for value in values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        torch.distributed.all_reduce(flat)
        parts = (flat / torch.distributed.get_world_size()).split([gradient.numel() for gradient in gradients])
        return tuple(part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True))


def is_main_process() -> bool:
    """Return True on rank 0, and where there is only one process."""
    return not are_many_processes() or torch.distributed.get_rank() == 0


def wait_for_everyone() -> None:
    if are_many_processes():
        torch.distributed.barrier()


def are_many_processes() -> bool:
    """Return whether this process trains together with others."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
