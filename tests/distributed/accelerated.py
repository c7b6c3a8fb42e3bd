"""Run by ``accelerate launch``: the engine that its config names."""

from __future__ import annotations

import sys
from pathlib import Path

from runs import STEPS, assert_same_run, part, patched, shard_on_the_cpu, tell, train  # first: it sets the path

# isort: split
import torch
from accelerate import Accelerator

FOLDER = Path(sys.argv[1])


def main():
    torch.set_num_threads(1)
    shard_on_the_cpu()
    accelerator = Accelerator(cpu=True)
    model, adapter = patched(projector=True)
    batches = [part(step, accelerator.process_index) for step in range(len(STEPS))]
    run = train(
        model,
        adapter,
        batches,
        prepare=accelerator.prepare,
        backward=accelerator.backward,
        mean=lambda loss: accelerator.reduce(loss, "mean"),
    )
    model = run.pop("model")
    assert_same_run(run, torch.load(FOLDER / "projector-True.pt"))
    adapter.save_pretrained(FOLDER / "adapter")

    state_dict = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        adapter.save_pretrained(FOLDER / "by state dict", state_dict=state_dict)
        tell(FOLDER, engine=type(model).__name__)
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main()
