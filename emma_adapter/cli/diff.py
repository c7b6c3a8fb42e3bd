"""``emma-adapter diff``: show how two adapters differ."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..messages import plain

if TYPE_CHECKING:
    from torch import Tensor

    from ..checkpoints.format import SavedAdapter

_DIFFERENT = 1


@click.command()
@click.argument("one", type=click.Path(path_type=Path))
@click.argument("other", type=click.Path(path_type=Path))
@click.pass_context
def diff(context: click.Context, one: Path, other: Path) -> None:
    """Show how two adapter folders differ; the exit code is 0 if they don't, and 1 if they do."""
    from ..checkpoints import reading

    adapters = [reading.read(folder) for folder in (one, other)]
    lines = [*_config_lines(*adapters), *_tensor_lines(*adapters)]
    for line in lines:
        click.echo(plain(line))
    context.exit(_DIFFERENT if lines else 0)


def _config_lines(first: SavedAdapter, second: SavedAdapter) -> Iterator[str]:
    facts = [
        {"base_model": a.base_model, "model_type": a.model_type, "reads_turns": a.reads_turns, **a.config.to_dict()}
        for a in (first, second)
    ]
    for name, value in facts[0].items():
        if value != facts[1][name]:
            yield f"{name}: {value!r} -> {facts[1][name]!r}"


def _tensor_lines(first: SavedAdapter, second: SavedAdapter) -> Iterator[str]:
    in_first, in_second = (
        {**a.alignment, **{f"projector {n}": v for n, v in a.projector.items()}} for a in (first, second)
    )
    for name in sorted(in_first.keys() | in_second.keys()):
        if name not in in_first or name not in in_second:
            yield f"{name}: only in the {'first' if name in in_first else 'second'}"
        elif difference := _difference(in_first[name], in_second[name]):
            yield f"{name}: {difference}"


def _difference(first: Tensor, second: Tensor) -> str | None:
    if first.shape != second.shape:
        return f"{list(first.shape)} -> {list(second.shape)}"
    if first.dtype != second.dtype:
        return f"{first.dtype} -> {second.dtype}"
    if first.equal(second):
        return None
    first, second = first.double().flatten(), second.double().flatten()
    norm, distance = first.norm().item(), (second - first).norm().item()
    cosine = (first @ second).item() / max(norm * second.norm().item(), 1e-300)
    return f"relative L2 difference {distance / norm if norm else float('inf'):.3g}, cosine {cosine:.4f}"
