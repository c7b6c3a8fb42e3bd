"""A training that two processes and a single one have in common; as a script, what one of the processes does."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from emma_adapter import EmmaVisionExperts, PatchError, add_vision_expert
from tests.experts.small import with_expert
from tests.support.zoo import ZOO, Row, answered

STEPS = 4
NAME = "qwen3_vl"


def prepared(*, sharded: bool = False) -> EmmaVisionExperts:
    """Two experts and a router of which some steps use nothing, in a model that is trained otherwise, too."""
    experts = with_expert(NAME)
    add_vision_expert(experts.model, "maps")
    if sharded:
        # FSDP can't keep processes in step that differ in what they train of the tower.
        return experts.train_only("stem")
    experts.model.requires_grad_(False)
    for parameter in (*experts.parameters(), *experts.model.model.language_model.layers[0].parameters()):
        parameter.requires_grad_(True)
    return experts


def loss_of(module: nn.Module, experts: EmmaVisionExperts, step: int, rank: int) -> Tensor:
    """Of one process's row. In the second step only one of them has a picture, in the third none; in the fourth, each
    goes another way."""
    has_picture = step in (0, 3) or (step == 1 and rank == 0)
    row = Row((f"{step} and {rank}?",), images=((56, 56),) if has_picture else (), seed=10 * step + rank)
    choice = ("stem", "original")[rank] if step == 3 else "stem"
    with experts.routed(choice):
        loss: Tensor = module(**answered(ZOO[NAME], [row], "yes.")).loss
    return loss


def router_loss(experts: EmmaVisionExperts, step: int, rank: int) -> Tensor:
    """Of one process's pictures, of which the processes have different numbers."""
    labels = ["stem", "original", "maps"][: 1 + 2 * rank]
    rows = [Row(images=((56, 56),), seed=100 * step + 10 * rank + number) for number in range(len(labels))]
    return experts.router_loss(labels=labels, **ZOO[NAME].batch(rows))


def train_router(experts: EmmaVisionExperts, ranks: list[int]) -> None:
    experts.train_only(router=True)
    optimizer = torch.optim.SGD(experts.parameter_groups(lr=0.5))
    for step in range(STEPS):
        optimizer.zero_grad()
        for rank in ranks:
            (router_loss(experts, step, rank) / len(ranks)).backward()
        optimizer.step()


def optimizer_of(experts: EmmaVisionExperts) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in experts.model.parameters() if p.requires_grad], lr=0.1)


def shard(model: nn.Module) -> nn.Module:
    for layer in model.model.language_model.layers:
        fully_shard(layer)
    return fully_shard(model)


def main(folder: str, wrapper: str) -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    experts = prepared(sharded=wrapper == "fsdp")
    module = shard(experts.model) if wrapper == "fsdp" else DistributedDataParallel(experts.model)
    optimizer = optimizer_of(experts)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(module, experts, step, rank).backward()
        optimizer.step()
    if wrapper == "fsdp":
        with pytest.raises(PatchError, match="sharded"):
            router_loss(experts, 0, rank)
    else:
        train_router(experts, [rank])
    experts.save_pretrained(folder)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
