"""Time of a step of drawing, and of what else could have been done: ``python -m benchmarks.unified.speed``.

Everything of a line is timed side by side in the same rounds. Ratios are to the first of each group: the base's own
layers over as many tokens against the same cache are the floor of a step; for the others see ``GROUPS``. On a CPU one
thread is used, and the processor's time is measured, which other processes don't lengthen.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from emma_adapter import EmmaUnified
from emma_adapter.unified.drawing import VelocityField, grid_of
from emma_adapter.unified.layers import Prefix, text_model_of
from emma_adapter.unified.reading import read_rows

from ..kernels.machine import describe_machine
from ..kernels.timing import Errors, time_calls
from .model import CHANNELS, COMPRESSION, SIZES, make, prompt_of

RESULTS = Path(__file__).parents[1] / "results" / "unified-speed.json"
RANK = 64
STEPS = 8
#: Name of a call to what it is, the first of a group being what its others are compared with.
GROUPS = {
    "a step": {
        "floor": "the base's own layers, as many tokens, the same cache",
        "rank": f"low-rank copies, rank {RANK}",
        "full": "full copies",
        "compiled": f"low-rank copies, rank {RANK}, by torch.compile",
    },
    "guidance": {"one batch": "both branches as one batch", "two calls": "one after the other"},
    f"a picture in {STEPS} steps": {
        "once": "the prompt is read once, and its cache shared by all steps",
        "each step": "the prompt is read again at every step",
    },
    "a step of an edit": {
        "channel-wise": "the reference picture's latents added to its visual tokens",
        "token-wise": "as further tokens: a prompt that is longer by one picture",
    },
}


class Case:
    """The calls for pictures of one size behind prompts of one length."""

    def __init__(self, drawings: dict[str, EmmaUnified], side: int, prompt_tokens: int) -> None:
        self.drawings = drawings
        self.tokens = (side // COMPRESSION) ** 2
        self.grid = (side // COMPRESSION, side // COMPRESSION)
        self.prompt = prompt_of(prompt_tokens)
        self.prefix = self._read(1)

    def _read(self, rows: int) -> Prefix:
        one = self.drawings["rank"]
        return read_rows(one.model, one._state, [(self.prompt, ())]).rows(torch.zeros(rows, dtype=torch.long))

    def field(self, kind: str, prefix: Prefix) -> tuple[VelocityField, Tensor, Tensor]:
        one, rows = self.drawings[kind], len(prefix.mask)
        device = prefix.mask.device
        places = grid_of(*self.grid, device).expand(rows, -1, -1)
        real = torch.ones(places.shape[:2], dtype=torch.bool, device=device)
        x = torch.randn(rows, 1, self.tokens, CHANNELS, device=device)
        return VelocityField(one.model, one._state, prefix, places, real, training=False), x, x.new_full((rows, 1), 0.5)

    def step(self, kind: str, prefix: Prefix) -> Callable[[], object]:
        field, x, t = self.field(kind, prefix)
        return lambda: field(x, t)

    def compiled_step(self) -> Callable[[], object]:
        field, x, t = self.field("rank", self.prefix)
        step = torch.compile(VelocityField.__call__)
        return lambda: step(field, x, t)

    def floor(self) -> Callable[[], object]:
        field, _, _ = self.field("rank", self.prefix)
        one = self.drawings["rank"]
        text: Any = text_model_of(one._state.family.inner(one.model))
        embedded = torch.randn(1, self.tokens, text.embed_tokens.embedding_dim, device=field.mask.device)
        embedded = embedded.to(field.dtype)
        return lambda: text(
            inputs_embeds=embedded,
            attention_mask=field.mask,
            position_ids=field.positions,
            **{field.cache_name: self.prefix.cache()},
        )

    def picture(self, *, again: bool) -> Callable[[], object]:
        field, x, t = self.field("rank", self.prefix)

        def once() -> None:
            self._read(1)
            for _ in range(STEPS):
                field(x, t)

        def each_step() -> None:
            for _ in range(STEPS):
                self._read(1)
                field(x, t)

        return each_step if again else once

    def longer(self) -> Prefix:
        """The prompt's cache with one picture's tokens more."""
        more = self.prefix.rows(torch.zeros(1, dtype=torch.long))
        repeats = -(-self.tokens // more.length)
        states = tuple(
            tuple(torch.cat([part] + [part] * repeats, 2)[:, :, : more.length + self.tokens] for part in layer)
            for layer in more.states
        )
        mask = more.mask.new_ones(1, more.length + self.tokens)
        return Prefix(states, mask, more.start + max(self.grid))  # type: ignore[arg-type]

    def groups(self) -> dict[str, dict[str, Callable[[], object]]]:
        two = self.prefix.rows(torch.zeros(2, dtype=torch.long))
        single = self.step("rank", self.prefix)
        step, guidance, picture, edit = GROUPS
        return {
            step: {
                "floor": self.floor(),
                "rank": self.step("rank", self.prefix),
                "full": self.step("full", self.prefix),
                "compiled": self.compiled_step(),
            },
            guidance: {"one batch": self.step("rank", two), "two calls": lambda: (single(), single())},
            picture: {"once": self.picture(again=False), "each step": self.picture(again=True)},
            edit: {"channel-wise": self.step("rank", self.prefix), "token-wise": self.step("rank", self.longer())},
        }


@click.command(help=__doc__)
@click.option("--size", default="small", show_default=True, type=click.Choice(list(SIZES)))
@click.option("--pixels", "sides", default=(256, 512, 1024), show_default=True, multiple=True, type=int)
@click.option("--prompt", "prompts", default=(128, 2048), show_default=True, multiple=True, type=int, help="Tokens.")
@click.option("--seconds", default=10.0, show_default=True, help="For each group.")
@click.option("--rounds", default=50, show_default=True, help="At most.")
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
@torch.no_grad()
def main(
    size: str, sides: tuple[int, ...], prompts: tuple[int, ...], seconds: float, rounds: int, output: Path
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    drawings = {name: make(SIZES[size], kind, device, dtype) for name, kind in (("rank", RANK), ("full", "full"))}
    records, errors = [], Errors()
    for side in sides:
        for prompt in prompts:
            case = Case(drawings, side, prompt)
            for group, calls in case.groups().items():
                for call in calls.values():
                    call()
                times = time_calls(calls, next(iter(calls)), device, errors, seconds=seconds, rounds=rounds)
                for name, timing in times.items():
                    record = {
                        "pixels": side,
                        "prompt tokens": case.prefix.length,
                        "group": group,
                        "call": name,
                        "milliseconds": round(timing.median / 1e3, 3),
                        "ratio": None if timing.ratio is None else round(timing.ratio, 3),
                    }
                    records.append(record)
                    click.echo(json.dumps(record))
    machine = describe_machine(device, date=str(date.today()), command="python -m benchmarks.unified.speed")
    told = {"machine": asdict(machine), "size": size, "dtype": str(dtype), "errors": errors, "records": records}
    output.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
