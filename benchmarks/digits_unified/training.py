"""Training that goes on where it was stopped: what a step draws depends on the seed and the step alone."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

#: Where unfinished trainings are kept.
WORK = Path("demo-output/digits_unified-work")

_EVERY = 100


class Optimizer:
    """Muon on matrices and convolution kernels, AdamW on everything else, both at one rate: warm-up, then cosine."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        rate: float,
        steps: float,
        *,
        edges: Iterable[nn.Parameter] = (),
        warm_up: int = 50,
        weight_decay: float = 0.0,
    ) -> None:
        """``edges``: matrices that AdamW shall take, as embeddings and heads. The rate of ``steps=math.inf`` stays."""
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.rate, self.steps, self.warm_up = rate, steps, warm_up
        elsewhere = {id(parameter) for parameter in edges}
        muon = [p for p in self.parameters if p.ndim in (2, 4) and len(p) >= 8 and id(p) not in elsewhere]
        taken = {id(parameter) for parameter in muon}
        # Muon takes matrices: a kernel's is a view of its memory.
        self._kernels = [(p, nn.Parameter(p.data.view(len(p), -1))) for p in muon if p.ndim == 4]
        matrices = [p for p in muon if p.ndim == 2] + [view for _, view in self._kernels]
        rest = [p for p in self.parameters if id(p) not in taken]
        self.optimizers: list[torch.optim.Optimizer] = []
        if matrices:
            muon_optimizer = torch.optim.Muon(
                matrices, lr=rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
            )
            self.optimizers.append(muon_optimizer)
        if rest:
            self.optimizers.append(torch.optim.AdamW(rest, lr=rate, weight_decay=0.0, betas=(0.9, 0.98)))

    def step(self, loss: Tensor, step: int) -> None:
        cosine = 0.5 * (1 + math.cos(math.pi * min(1, step / self.steps)))
        for parameter in self.parameters:
            parameter.grad = None
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for kernel, view in self._kernels:
            view.grad = None if kernel.grad is None else kernel.grad.flatten(1)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.rate * min(1, (step + 1) / self.warm_up) * (0.02 + 0.98 * cosine)
            optimizer.step()

    def state(self) -> dict[str, object]:
        return {
            "parameters": [parameter.detach() for parameter in self.parameters],
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }

    def restore(self, state: dict[str, list]) -> None:  # type: ignore[type-arg]
        with torch.no_grad():
            for parameter, saved in zip(self.parameters, state["parameters"], strict=True):
                parameter.copy_(saved)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def train(
    name: str,
    optimizer: Optimizer,
    loss: Callable[[int, np.random.Generator], Tensor],
    *,
    seed: int,
    first: int = 0,
    until: int | None = None,
    work: Path | None = WORK,
) -> float:
    """Run ``loss(step, rng)`` and the optimizer until its last step, and return the smoothed loss.

    ``rng``, and torch's own generator, are seeded anew at each step. With ``work``, every hundred steps are saved
    there, and the same call goes on from them. ``first``: begin with this step, with parameters that have done those
    before; ``until``: stop before this one, as an interruption would.
    """
    saved = None if work is None else work / f"{name}.pt"
    average = math.nan
    if saved is not None and saved.exists():
        state = torch.load(saved)
        optimizer.restore(state)
        first, average = state["step"], state["loss"]
    last = int(optimizer.steps if until is None else min(optimizer.steps, until))
    progress = tqdm(range(first, last), desc=name, initial=first, total=optimizer.steps, mininterval=20, maxinterval=60)
    for step in progress:
        torch.manual_seed(seed * 1_000_003 + step)
        value = loss(step, np.random.default_rng((seed, step)))
        optimizer.step(value, step)
        average = value.item() if math.isnan(average) else 0.98 * average + 0.02 * value.item()
        progress.set_postfix(loss=f"{average:.4f}", refresh=False)
        if saved is not None and ((step + 1) % _EVERY == 0 or step + 1 == last):
            saved.parent.mkdir(parents=True, exist_ok=True)
            scratch = saved.with_suffix(".unfinished")
            torch.save({"step": step + 1, "loss": average, **optimizer.state()}, scratch)
            os.replace(scratch, saved)
    return average
