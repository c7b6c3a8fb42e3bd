"""The runs that several processes and a single one have in common: their model, batches and steps."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import Tensor, nn

from emma_adapter import EmmaAdapter, EmmaConfig, patch_model
from tests.support import tiny

PROCESSES = 2
PROCESSOR = tiny.processor()
CONFIG = EmmaConfig(fusion="attention", inner_dim=8, num_heads=2)
#: Images of each row of the global batch, for each step. Each process takes half of the rows: in the second step one
#: has no image at all, in the third none has, in the fourth the other one hasn't.
STEPS = ((2, 1, 1, 2), (1, 2, 0, 0), (0, 0, 0, 0), (0, 0, 2, 1), (1, 1, 1, 1))


def base_model() -> nn.Module:
    return tiny.llava(vocab_size=len(tiny.tokenizer()), image_token=4)


def patched(*, projector: bool = False) -> tuple[nn.Module, EmmaAdapter]:
    """A model in training mode with an adapter that moves its visual tokens."""
    model = base_model()
    torch.manual_seed(3)
    adapter = patch_model(model, CONFIG, processor=PROCESSOR)
    tiny.train_randomly(adapter.alignment, scale=0.2)
    adapter.train_only(projector=projector)
    return model.train(), adapter


def global_batch(step: int) -> dict[str, Tensor]:
    """As many labels in each row, so that the mean over the batch is the mean of the means over its halves."""
    batch = tiny.token_inputs(list(STEPS[step]), seed=step)
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, :-1] = -100
    return batch


def part(step: int, rank: int) -> dict[str, Tensor]:
    batch, images = global_batch(step), STEPS[step]
    share = len(images) // PROCESSES
    rows = slice(rank * share, (rank + 1) * share)
    mine = {name: batch[name][rows] for name in ("input_ids", "attention_mask", "labels")}
    if any(images[rows]):
        first = sum(images[: rows.start])
        mine["pixel_values"] = batch["pixel_values"][first : first + sum(images[rows])]
    return mine


def whole(tensor: Any) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def trained(adapter: EmmaAdapter) -> dict[str, nn.Parameter]:
    names = dict(adapter.model.named_parameters())
    return {name: parameter for name, parameter in names.items() if parameter.requires_grad}


def train(
    model: nn.Module,
    adapter: EmmaAdapter,
    batches: Sequence[dict[str, Tensor]],
    *,
    prepare: Callable[..., tuple[nn.Module, Any]] = lambda model, optimizer: (model, optimizer),
    backward: Callable[[Tensor], None] = Tensor.backward,
    mean: Callable[[Tensor], Tensor] = lambda loss: loss,
) -> dict[str, Any]:
    """What each step gave: the loss, the gradients, and at the end the parameters."""
    model, optimizer = prepare(model, torch.optim.SGD(adapter.parameter_groups(lr=0.05), lr=0.05, momentum=0.9))
    losses, gradients = [], []
    for batch in batches:
        loss = model(**batch).loss
        backward(loss)
        losses.append(mean(loss.detach()).clone())
        gradients.append({name: whole(parameter.grad) for name, parameter in trained(adapter).items()})
        optimizer.step()
        optimizer.zero_grad()
    final = {name: whole(parameter) for name, parameter in trained(adapter).items()}
    return {"model": model, "losses": torch.stack(losses), "gradients": gradients, "parameters": final}


def assert_same_run(run: dict[str, Any], reference: dict[str, Any]) -> None:
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(run["losses"], reference["losses"], **close)
    for own, expected in zip(run["gradients"], reference["gradients"], strict=True):
        assert set(own) == set(expected)
        for name, gradient in own.items():
            torch.testing.assert_close(gradient, expected[name], **close, msg=lambda said, name=name: f"{name}: {said}")
    idle = run["gradients"][2].values()
    assert not any(gradient.any() for gradient in idle), "no process had an image"
    torch.testing.assert_close(run["parameters"], reference["parameters"], **close)


class Examples(torch.utils.data.Dataset):
    """Rows for Trainer, every second one without an image: with one row a step, only one of two processes has one."""

    def __init__(self) -> None:
        images = (1, 0) * 6
        batch = tiny.token_inputs(list(images), padding_side="right")
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        batch["labels"][:, :-3] = -100
        pixels = iter(batch["pixel_values"])
        self.rows = [
            {name: batch[name][row] for name in ("input_ids", "attention_mask", "labels")}
            | ({"pixel_values": next(pixels)} if number else {})
            for row, number in enumerate(images)
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.rows[index]

    @staticmethod
    def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        names = ("input_ids", "attention_mask", "labels")
        pixels = [row["pixel_values"] for row in rows if "pixel_values" in row]
        batch = {name: torch.stack([row[name] for row in rows]) for name in names}
        return {**batch, "pixel_values": torch.stack(pixels)} if pixels else batch


def train_with_trainer(folder: Path, *, batch_size: int, **options: Any) -> tuple[str, list[float]]:
    """Train, save ``folder/checkpoint-3`` and ``folder/final``; what wrapped the model, and the loss of each step."""
    from transformers import Trainer, TrainingArguments

    model, _ = patched(projector=True)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=5,
        save_steps=3,
        per_device_train_batch_size=batch_size,
        learning_rate=1e-2,
        optim="sgd",
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
        **options,
    )
    gc.freeze()
    data = Examples()
    trainer = Trainer(model=model, args=arguments, train_dataset=data, data_collator=data.collate)
    trainer.train()
    trainer.save_model(str(folder / "final"))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return type(trainer.model_wrapped).__name__, losses


def shard_on_the_cpu() -> None:
    """accelerate, and with it Trainer, takes FSDP for GPUs only, and goes on with DistributedDataParallel without one.
    Its code runs with gloo too."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    original = AcceleratorState.__init__

    def init(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        plugin = fsdp_plugin or self.__dict__.get("fsdp_plugin")
        if plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin

    AcceleratorState.__init__ = init


def tell(folder: Path, **what: Any) -> None:
    (folder / "told.json").write_text(json.dumps(what))
