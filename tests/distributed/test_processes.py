"""Two processes do what one does: PyTorch's wrappers, accelerate and transformers' Trainer, with gloo on the CPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from emma_adapter import load_adapter
from tests.distributed.runs import (
    PROCESSES,
    PROCESSOR,
    STEPS,
    base_model,
    global_batch,
    patched,
    train,
    train_with_trainer,
)
from tests.support.budget import budget

HERE = Path(__file__).parent
WEIGHTS = "adapter_model.safetensors"
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES))
LAYERS = "LlamaDecoderLayer"
SHARDED = "FSDPLlavaForConditionalGeneration"
DOCUMENTED = (HERE.parents[1] / "docs" / "distributed.md").read_text()
CONFIGS = {
    "DistributedDataParallel": f"distributed_type: MULTI_GPU\nnum_machines: 1\nnum_processes: {PROCESSES}\n",
    SHARDED: DOCUMENTED.split("```yaml\n")[1].split("```")[0],
}


def launch(*command: str, seconds: int = 300) -> None:
    """Run a module in processes of their own; that they hang is a failure."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"{command} hangs\n{process.communicate()[0]}")
    assert process.returncode == 0, output


def told(folder: Path) -> dict:
    return json.loads((folder / "told.json").read_text())


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """What a single process gives, saved by it too."""
    folder = tmp_path_factory.mktemp("single")
    for projector in (False, True):
        model, adapter = patched(projector=projector)
        run = train(model, adapter, [global_batch(step) for step in range(len(STEPS))])
        assert all(gradient.any() for gradient in run["gradients"][0].values())
        assert run["losses"][0] != run["losses"][-1]
        del run["model"]
        torch.save(run, folder / f"projector-{projector}.pt")
        adapter.save_pretrained(folder / f"projector-{projector}")
    return folder


def assert_saved_as(reference: Path, saved: Path) -> None:
    """The same names, shapes, dtypes and values, in a folder that a single process reads."""
    expected = load_file(reference / WEIGHTS)
    torch.testing.assert_close(load_file(saved / WEIGHTS), expected, rtol=1e-5, atol=1e-6)
    ours, theirs = (json.loads((folder / "adapter_config.json").read_text()) for folder in (saved, reference))
    assert {**ours, "sha256": ""} == {**theirs, "sha256": ""}
    adapter = load_adapter(base_model(), saved, processor=PROCESSOR)
    loaded = {f"alignment.{name}": value.detach() for name, value in adapter.named_parameters()}
    torch.testing.assert_close(loaded, {name: expected[name] for name in loaded}, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_wrappers_of_pytorch(references):
    launch(*TORCHRUN, str(HERE / "wrapped.py"), str(references))
    for name in told(references)["saved"]:
        projector = name.endswith("True")
        assert_saved_as(references / f"projector-{projector}", references / name)
    assert_saved_as(references / "projector-True", references / "other")


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("engine", list(CONFIGS))
def test_accelerate(engine, references, tmp_path):
    (tmp_path / "projector-True.pt").symlink_to(references / "projector-True.pt")
    (tmp_path / "config.yaml").write_text(CONFIGS[engine])
    settings = ("--config_file", str(tmp_path / "config.yaml"), "--main_process_port", "0")
    launch("accelerate.commands.launch", *settings, str(HERE / "accelerated.py"), str(tmp_path))
    assert told(tmp_path) == {"engine": engine}
    assert_saved_as(references / "projector-True", tmp_path / "adapter")
    assert_saved_as(references / "projector-True", tmp_path / "by state dict")


@pytest.mark.slow
@pytest.mark.parametrize("engine", budget(["DistributedDataParallel"], list(CONFIGS)))
def test_trainer(engine, tmp_path):
    options = {"fsdp": "full_shard", "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": [LAYERS]}}
    launch(*TORCHRUN, str(HERE / "trainer.py"), str(tmp_path), json.dumps(options if engine == SHARDED else {}))
    single = tmp_path / "single"
    _, expected = train_with_trainer(single, batch_size=PROCESSES)
    assert told(tmp_path)["engine"] == engine
    assert told(tmp_path)["losses"] == pytest.approx(expected, abs=2e-4)  # Trainer rounds them
    for name in ("checkpoint-3", "final"):
        assert_saved_as(single / name, tmp_path / name)
        own, same = (load_file(folder / name / "model.safetensors") for folder in (tmp_path, single))
        torch.testing.assert_close(own, same, rtol=1e-5, atol=1e-6)
