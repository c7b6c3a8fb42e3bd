"""``emma-adapter diff``: how two adapters differ."""

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
    """How two adapter folders differ; the exit code is 0 if they don't, and 1 if they do."""
    from ..checkpoints import reading

    adapters = [reading.read(folder) for folder in (one, other)]
    lines = [*_config_lines(*adapters), *_tensor_lines(*adapters)]
    for line in lines:
        click.echo(plain(line))
    context.exit(_DIFFERENT if lines else 0)


def _config_lines(one: SavedAdapter, other: SavedAdapter) -> Iterator[str]:
    facts = [
        {"base_model": a.base_model, "model_type": a.model_type, "reads_turns": a.reads_turns, **a.config.to_dict()}
        for a in (one, other)
    ]
    for name, value in facts[0].items():
        if value != facts[1][name]:
            yield f"{name}: {value!r} -> {facts[1][name]!r}"


def _tensor_lines(one: SavedAdapter, other: SavedAdapter) -> Iterator[str]:
    tensors, others = ({**a.alignment, **{f"projector {n}": v for n, v in a.projector.items()}} for a in (one, other))
    for name in sorted(tensors.keys() | others.keys()):
        if name not in tensors or name not in others:
            yield f"{name}: only in the {'first' if name in tensors else 'second'}"
        elif difference := _difference(tensors[name], others[name]):
            yield f"{name}: {difference}"


def _difference(one: Tensor, other: Tensor) -> str | None:
    if one.shape != other.shape:
        return f"{list(one.shape)} -> {list(other.shape)}"
    if one.dtype != other.dtype:
        return f"{one.dtype} -> {other.dtype}"
    if one.equal(other):
        return None
    one, other = one.double().flatten(), other.double().flatten()
    norm, distance = one.norm().item(), (other - one).norm().item()
    cosine = (one @ other).item() / max(norm * other.norm().item(), 1e-300)
    return f"relative L2 difference {distance / norm if norm else float('inf'):.3g}, cosine {cosine:.4f}"
