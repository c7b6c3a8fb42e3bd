"""Restoring an adapter of a patched model from a folder that was checked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from ..alignment.config import EmmaConfig
from ..alignment.fusion.dispatch import Kernel
from ..checkpoints import reading
from ..checkpoints.format import WEIGHTS_NAME, SavedAdapter
from ..errors import CheckpointError, PatchError
from ..messages import listed
from ..patching import precision, projectors, sites
from ..patching.attached_adapter import AttachedAdapter
from ..patching.state import state_of
from . import named_adapters
from .compatibility import check_encoder, check_fit, check_not_offloaded
from .config_from_model import make_pipeline, make_reader, resolve_encoder


def read_for(model: nn.Module, directory: Path, name: str | None = None) -> SavedAdapter:
    """Return a saved adapter that can be loaded into this model, of which nothing is changed yet.

    Raises:
        CheckpointError: if the files are damaged, or made for another model, which shows before the values are read.
        PatchError: if parts that would take the values are offloaded.
    """
    saved = reading.read(directory, check=lambda described: check_fit(model, described))
    check_fit(model, saved)
    if not saved.intact:
        raise CheckpointError(
            f"{saved.source / WEIGHTS_NAME} is damaged: its tensors don't match the checksum they were "
            "saved with; download or copy it again"
        )
    check_not_offloaded(model, saved, name)
    return saved


def restore(
    model: nn.Module,
    saved: SavedAdapter,
    *,
    name: str | None = None,
    processor: Any = None,
    instruction_encoder: str | nn.Module | None = None,
    kernel: Kernel | None = None,
    downloaded: bool = False,
) -> None:
    """Load into the adapter of that name (default: the active one), which is added if there is none.

    The active adapter stays active, also meanwhile. If this fails, nothing has changed.

    Raises:
        PatchError: if the adapter is of another kind than the saved one.
    """
    state = state_of(model)
    name = state.active if name is None else name
    if name not in state.adapters:
        config = saved.config if kernel is None else saved.config.replace(kernel=kernel)
        check_encoder(model, saved, instruction_encoder, downloaded=downloaded)
        try:
            named_adapters.add(model, name, config, processor, instruction_encoder)
            assign(model, name, saved)
        except BaseException:
            if name in state.adapters:
                named_adapters.remove(model, name)
            raise
        return
    current_config = state.adapters[name].config
    if not _same_build(current_config, saved.config, ignore_encoder=instruction_encoder is not None):
        raise PatchError(
            "the model is patched with another kind of adapter than the saved one; unpatch_model(model) first, and "
            "load_adapter will patch it, or load_adapter(model, …, name=…) under another name. "
            f"Here and in {saved.source} differ: {listed(_differences(current_config, saved.config))}"
        )
    with _undone_on_failure(state.adapters[name]):
        _refit(model, name, processor, instruction_encoder, kernel)
        assign(model, name, saved)


def assign(model: nn.Module, name: str, saved: SavedAdapter) -> None:
    """Give an adapter the saved values, and those of the projector that was trained with it."""
    state = state_of(model)
    projectors.assign(state, state.adapters[name], saved.alignment, saved.projector)
    precision.remember_weights(model)


@contextmanager
def _undone_on_failure(adapter: AttachedAdapter) -> Iterator[None]:
    """Undo what loading has changed of an adapter, if the block raises."""
    fields = dict(vars(adapter))
    # Loading replaces the tensors of alignments, but writes over those of projectors.
    values = {tensor: tensor.data for tensor in adapter.state_dict(keep_vars=True).values()}
    written_over = {parameter: parameter.detach().clone() for parameter in adapter.projector_parameters().values()}
    kernels = {alignment: alignment.config.kernel for alignment in adapter.alignments().values()}
    try:
        yield
    except BaseException:
        vars(adapter).update(fields)
        if not written_over:
            for site in adapter.sites().values():
                sites.remove_own_projector(site, adapter.name)
        for tensor, data in values.items():
            tensor.data = data
        for parameter, value in written_over.items():
            parameter.data.copy_(value)
        for alignment, kernel in kernels.items():
            if alignment.config.kernel != kernel:
                alignment.use_kernel(kernel)
        raise


def _same_build(current: EmmaConfig, saved: EmmaConfig, *, ignore_encoder: bool) -> bool:
    """Return whether both have the same weights and read the same instruction, wherever the encoder is found."""
    ignored = {"instruction_encoder": "given"} if ignore_encoder else {}
    return current.without_run_time().replace(**ignored) == saved.without_run_time().replace(**ignored)


def _differences(current: EmmaConfig, saved: EmmaConfig) -> list[str]:
    """Return what is another one in two configs, as an error tells it; how they run makes no difference."""
    saved_values = saved.without_run_time().to_dict()
    return [
        f"{name}: {value!r} and {saved_values[name]!r}"
        for name, value in current.without_run_time().to_dict().items()
        if value != saved_values[name]
    ]


def _refit(
    model: nn.Module, name: str, processor: Any, instruction_encoder: str | nn.Module | None, kernel: Kernel | None
) -> None:
    """Give an adapter another processor, encoder or kernel, where one is given."""
    state = state_of(model)
    adapter = state.adapters[name]
    config, reader, encoder = adapter.config, adapter.pipeline.reader, adapter.pipeline.encoder
    if processor is not None:
        reader = make_reader(model, config, processor)
    if instruction_encoder is not None:
        config, encoder = resolve_encoder(config, instruction_encoder, state.family.inner(model))
    if kernel is not None:
        config = config.replace(kernel=kernel)
        for alignment in adapter.alignments().values():
            alignment.use_kernel(kernel)
    adapter.config, adapter.pipeline = config, make_pipeline(config, reader, encoder)
