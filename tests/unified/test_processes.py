"""Two processes under DistributedDataParallel train what one does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.unified.two_processes import STEPS, loss_of, optimizer_of, prepared


@pytest.mark.slow
@pytest.mark.nightly
def test_two_processes_train_what_one_does(tmp_path):
    script = Path(__file__).with_name("two_processes.py")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    subprocess.run([sys.executable, *command], check=True, env=environment, timeout=300)
    adapter = prepared()
    optimizer = optimizer_of(adapter)
    for step in range(STEPS):
        optimizer.zero_grad()
        for rank in range(2):
            (loss_of(adapter.model, adapter, step, rank) / 2).backward()
        optimizer.step()
    saved = load_file(tmp_path / "unified_model.safetensors")
    own = adapter.model.emma_unified.default.state_dict()
    torch.testing.assert_close(saved, dict(own), atol=1e-6, rtol=1e-5)
    assert (own["fusion.latents"] - prepared().model.emma_unified.default.fusion["latents"]).abs().max() > 1e-4
