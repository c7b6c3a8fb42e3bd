"""Run by ``torchrun``: PyTorch's own DistributedDataParallel and ``fully_shard``."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

from runs import PROCESSOR, STEPS, assert_same_run, base_model, part, patched, tell, train  # first: it sets the path

# isort: split
import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from emma_adapter import PatchError, get_adapter, load_adapter, patch_model, unpatch_model

FOLDER = Path(sys.argv[1])


def shard(model, *, embeddings=False):
    for layer in model.model.language_model.layers:
        fully_shard(layer)
    if embeddings:  # as accelerate does
        fully_shard(model.get_input_embeddings())
    return fully_shard(model)


WRAPPERS = {
    "ddp": DistributedDataParallel,
    "fsdp": shard,
    "fsdp, embeddings apart": lambda model: shard(model, embeddings=True),
}


def mean(loss):
    dist.all_reduce(loss)
    return loss / dist.get_world_size()


def trains_as_a_single_process(wrapper, *, projector):
    reference = torch.load(FOLDER / f"projector-{projector}.pt")
    model, adapter = patched(projector=projector)
    wrapped = WRAPPERS[wrapper](model)
    batches = [part(step, dist.get_rank()) for step in range(len(STEPS))]
    assert_same_run(train(wrapped, adapter, batches, mean=mean), reference)
    return wrapped, adapter


def text_only_calls_stay_bit_equal(adapter):
    batch = part(2, 0)
    logits = adapter.model(**batch).logits
    with adapter.disabled():
        assert torch.equal(logits, adapter.model(**batch).logits)


def generates_as_a_single_process(model, adapter, saved):
    """One process has images, the other none."""
    batch = {name: value for name, value in part(1, dist.get_rank()).items() if name != "labels"}
    settings = {"max_new_tokens": 3, "do_sample": False}
    register_fsdp_forward_method(model, "generate")
    got = model.eval().generate(**batch, **settings, synced_gpus=isinstance(model, FSDPModule))
    single = load_adapter(base_model(), saved, processor=PROCESSOR).model
    assert torch.equal(got, single.generate(**batch, **settings))


def saves(wrapper, adapter, folder):
    if wrapper == "ddp":
        if dist.get_rank() == 0:  # alone: nobody waits
            adapter.save_pretrained(folder)
        adapter.save_pretrained(folder.with_name("other"), is_main_process=dist.get_rank() == 1)
        dist.barrier()
    else:
        adapter.save_pretrained(folder)
    assert (folder / "adapter_model.safetensors").is_file()  # on every process, at once


def refuses_what_cannot_work():
    with pytest.raises(PatchError, match="first, then wrap"):
        patch_model(DistributedDataParallel(base_model()))
    with pytest.raises(PatchError, match="first, then wrap"):
        patch_model(shard(base_model()))

    model = base_model().train()
    wrapped = DistributedDataParallel(model)
    patch_model(model, processor=PROCESSOR)  # nothing can be seen here yet
    with pytest.raises(PatchError, match="after it was wrapped"):
        wrapped(**part(0, dist.get_rank()))
    with torch.no_grad():
        wrapped(**part(0, dist.get_rank()))

    model, adapter = patched()
    fully_shard(adapter.alignment)
    shard(model)
    with pytest.raises(PatchError, match="sharded on its own"):
        model(**part(0, dist.get_rank()))


def refuses_what_comes_too_late(model, adapter, saved):
    with pytest.raises(PatchError, match="then shard"):
        load_adapter(model, saved)
    with pytest.raises(PatchError, match="disable_adapter"):
        unpatch_model(model)
    with pytest.raises(PatchError, match="instruction="), adapter.instruction(torch.tensor([[10]])):
        pass


def refuses_to_keep_a_sharded_projector():
    model, adapter = patched()
    shard(model)
    with pytest.raises(PatchError, match="then shard"):
        adapter.train_only(projector=True)


def waits_for_no_gradient_of_the_projector_that_stands_aside():
    """Trainable, but another runs in its place: the second call would complain of the first."""
    model, adapter = patched(projector=True)
    adapter.unfreeze()
    model.model.vision_tower.requires_grad_(False)
    wrapped = DistributedDataParallel(model)
    for step in range(2):
        wrapped(**part(step, dist.get_rank())).loss.backward()
    unused = [p for n, p in model.model.multi_modal_projector.named_parameters() if "emma" not in n]
    assert all(parameter.requires_grad and not parameter.grad.any() for parameter in unused)
    assert all(parameter.grad.any() for parameter in adapter.projector.parameters())


def main():
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=90))
    done = []
    for wrapper in WRAPPERS:
        for projector in (False, True):
            saved = FOLDER / f"{wrapper}, projector {projector}"
            wrapped, adapter = trains_as_a_single_process(wrapper, projector=projector)
            assert get_adapter(wrapped).model is adapter.model
            text_only_calls_stay_bit_equal(adapter)
            saves(wrapper, adapter, saved)
            generates_as_a_single_process(adapter.model, adapter, saved)
            done.append(saved.name)
    refuses_what_comes_too_late(adapter.model, adapter, saved)
    refuses_to_keep_a_sharded_projector()
    waits_for_no_gradient_of_the_projector_that_stands_aside()
    refuses_what_cannot_work()
    if dist.get_rank() == 0:
        tell(FOLDER, saved=done)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
