"""A training that two processes and a single one have in common; as a script, what one of the processes does."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from emma_adapter import EmmaUnified, UnifiedConfig
from unified.small import picture, unified

STEPS = 3


def prepared() -> EmmaUnified:
    config = UnifiedConfig(decoupling=2, noise_draws=2)
    adapter = unified("qwen3_vl", config).train_only()
    adapter.model.train()
    return adapter


def loss_of(module: nn.Module, adapter: EmmaUnified, step: int, rank: int) -> Tensor:
    """Of one process's rows. In the second step only one of them has a picture, in the third none."""
    image = picture(step, 56, 84) if step == 0 or (step == 1 and rank == 0) else None
    rows = [{"prompt": f"{step} and {rank}", "target": picture(10 * step + rank, 64, 64), "image": image}]
    torch.manual_seed(10 * step + rank)
    loss: Tensor = module(**adapter.collator()(rows)).loss
    return loss


def optimizer_of(adapter: EmmaUnified) -> torch.optim.Optimizer:
    return torch.optim.SGD(adapter.parameter_groups(lr=0.1))


def main(folder: str) -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    adapter = prepared()
    module, optimizer = DistributedDataParallel(adapter.model), optimizer_of(adapter)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(module, adapter, step, rank).backward()
        optimizer.step()
    adapter.save_pretrained(folder)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
