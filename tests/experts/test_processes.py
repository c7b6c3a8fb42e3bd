"""Two processes train what one does, also where a step uses no expert."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.experts.two_processes import STEPS, loss_of, optimizer_of, prepared, train_router
from tests.support.budget import budget


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", budget(["fsdp"], ["ddp", "fsdp"]))
def test_two_processes_train_what_one_does(tmp_path, wrapper):
    script = Path(__file__).with_name("two_processes.py")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launch, str(script), str(tmp_path), wrapper]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    subprocess.run(command, check=True, env=environment, timeout=300)
    experts = prepared(sharded=wrapper == "fsdp")
    optimizer = optimizer_of(experts)
    for step in range(STEPS):
        optimizer.zero_grad()
        for rank in range(2):
            loss = loss_of(experts.model, experts, step, rank) / 2
            if loss.requires_grad:  # not without pictures, if the expert alone is trained
                loss.backward()
        optimizer.step()
    if wrapper == "ddp":
        train_router(experts, [0, 1])
    saved = load_file(tmp_path / "vision_experts.safetensors")
    own, before = experts.model.emma_experts.state_dict(), prepared().model.emma_experts.state_dict()
    torch.testing.assert_close(saved, dict(own), atol=1e-6, rtol=1e-5)
    moved = {name.split("/")[0] for name, value in saved.items() if not torch.equal(value, before[name])}
    assert moved == {"experts.stem"} | ({"router.stem", "router.maps"} if wrapper == "ddp" else set())
