"""Visual tokens before and after the adapter in one call of a model, in the raster of each image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.handle import EmmaAdapter
from ..alignment.fusion.packed_images import Grid
from ..alignment.module import EmmaAlignment
from ..errors import AnalysisError
from ..instructions.pipeline import Instruction
from ..models.families import Box, MediaLayout
from ..models.projected_tokens import TokenSizes, joined, token_sizes
from ..modules.method_guard import first_tensor
from ..modules.wrappers import base_of
from ..patching.routing import ObservedAlignment
from ..patching.sites import MAIN_PLACE
from ..patching.state import state_of

Model = nn.Module | EmmaAdapter


@dataclass(frozen=True, eq=False)
class VisualEntry:
    """An image, a tile or a frame in one call. Tensors are float32 on the CPU, tokens row by row."""

    #: ``[N, D]``, the adapter's input: the vision encoder's output, or the projector's.
    before: Tensor
    #: ``[N, D]``, the adapter's output, which the projector, or the language model, reads instead.
    after: Tensor
    #: ``(height, width)`` in visual tokens; None where the tokens form no grid, as with a class token among them.
    grid: Grid | None
    modality: str
    #: Row of the batch (or packed sample), number of the image or video in the call, number of the tile or frame in it.
    row: int
    medium: int
    index: int
    #: The entry's place in its image; None if the call doesn't tell.
    box: Box | None
    #: ``[T, Dt]``, and bool ``[T]`` or None if all positions count.
    instruction: Tensor
    instruction_mask: Tensor | None
    #: ``[P, L]``, the projector's output with and without the adapter, if requested: of the entry, or of the whole
    #: medium if ``shared``.
    projected: Tensor | None = None
    projected_before: Tensor | None = None
    shared: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a map of its tokens: the grid, or ``(N,)``."""
        return self.grid or (len(self.before),)


def observe(
    model: Model, inputs: Mapping[str, Any], instruction: Instruction | None = None, *, projected: bool = False
) -> list[VisualEntry]:
    """Call the model, and return the adapter's inputs and outputs in the order of the call.

    The call is without gradients and in eval mode. The model is left as it was, even when it raises.

    Args:
        model: a patched model, or a wrapper around one, or its handle.
        inputs: what the model's processor returned; moved to the model's device.
        instruction: as the call's own ``instruction=``.
        projected: also return the projector's outputs with and without the adapter, for which the model is called
            twice.

    Raises:
        PatchError: if the model is not patched.
        AnalysisError: if the call has no image, or the adapter is disabled.
    """
    model = model.model if isinstance(model, EmmaAdapter) else model
    base = base_of(model)
    state = state_of(base)
    if not isinstance(inputs, Mapping):
        raise AnalysisError(f"a batch must be what the processor returns, a mapping; got a {type(inputs).__name__}")
    alignments: list[ObservedAlignment] = []
    outputs: list[Tensor] = []
    originals: list[Tensor] = []
    arguments = {name: _to_device(value, base) for name, value in inputs.items()}
    if instruction is not None:
        arguments["instruction"] = instruction
    projector = state.family.projector(state.family.inner(base))
    with torch.no_grad(), in_eval_mode(model):
        with state.observing(alignments.append), _output_of(projector, outputs) if projected else nullcontext():
            model(**arguments)
        if projected:
            with state.disabled(), _output_of(projector, originals):
                model(**arguments)
    main = [alignment for alignment in alignments if alignment.place == MAIN_PLACE]
    native = token_sizes(state.family, state.family.inner(base), projected=state.current.config.aligns_projected)
    entries: list[VisualEntry] = []
    media: dict[str, int] = {}
    for number, alignment in enumerate(main):
        boxes = state.family.boxes(alignment.call, alignment.route.layout)
        output = (outputs[number], originals[number]) if projected else (None, None)
        first_medium = media.get(alignment.call.modality, 0)
        media[alignment.call.modality] = first_medium + len(alignment.route.layout.entries)
        entries += _entries(alignment, native, boxes, output, first_medium)
    if not entries:
        raise AnalysisError(
            "the adapter saw no visual tokens in this call: pass everything that the processor returns for a prompt "
            "with an image, outside of adapter.disable_adapter()"
        )
    return entries


def observed_batches(
    model: Model, batches: Any, *, projected: bool = False
) -> Iterator[list[tuple[int, list[VisualEntry]]]]:
    """Yield for each batch its rows that show an image, ``(row, entries)`` in order.

    Raises:
        AnalysisError: if ``batches`` is a single batch, or holds none.
    """
    if isinstance(batches, Mapping):
        raise AnalysisError("batches must be an iterable of batches, as a DataLoader: put a single one in a list")
    empty = True
    for batch in batches:
        empty = False
        rows: dict[int, list[VisualEntry]] = {}
        for entry in observe(model, batch, projected=projected):
            rows.setdefault(entry.row, []).append(entry)
        yield sorted(rows.items())
    if empty:
        raise AnalysisError("there is no batch to analyse: an iterator that was read before is empty")


def alignment_of(model: Model | EmmaAlignment) -> EmmaAlignment:
    """Return the active adapter's module at the projector.

    Raises:
        PatchError: if the model is not patched.
    """
    if isinstance(model, EmmaAlignment):
        return model
    base = base_of(model.model if isinstance(model, EmmaAdapter) else model)
    return state_of(base).current.alignments()[MAIN_PLACE]


def _entries(
    alignment: ObservedAlignment,
    native: TokenSizes,
    boxes: Any,
    output: tuple[Tensor | None, Tensor | None],
    first_medium: int,
) -> Iterator[VisualEntry]:
    layout, instruction = alignment.route.layout, alignment.route.instruction
    before, after = (_split(tokens, layout) for tokens in (alignment.visual_tokens, alignment.aligned))
    projected, originals = (_split_output(tokens, layout) for tokens in output)
    rows = alignment.route.rows.tolist()
    mask = None if instruction.mask is None else instruction.mask.cpu()
    number = 0
    for medium, size in enumerate(layout.entries):
        for index in range(size):
            if layout.tokens[medium]:  # else the language model reads none of it
                n = len(before[number])
                grid = layout.grids[number] if layout.grids is not None else native.grid if n == native.number else None
                order = None if layout.orders is None or grid is None else layout.orders[grid].cpu().argsort()
                yield VisualEntry(
                    before=before[number] if order is None else before[number][order],
                    after=after[number] if order is None else after[number][order],
                    grid=None if grid is None else (int(grid[0]), int(grid[1])),
                    modality=alignment.call.modality,
                    row=rows[medium],
                    medium=first_medium + medium,
                    index=index,
                    box=boxes[number],
                    instruction=instruction.tokens[rows[medium]].detach().float().cpu(),
                    instruction_mask=None if mask is None else mask[rows[medium]].bool(),
                    projected=_part(projected, number, medium),
                    projected_before=_part(originals, number, medium),
                    shared=not projected[0] and size > 1,
                )
            number += 1


def _split(tokens: Tensor, layout: MediaLayout) -> list[Tensor]:
    tokens = tokens.detach().float().cpu()
    if not layout.packed:
        # A projector may return the grid of each entry.
        return list(tokens.flatten(1, -2).unbind(0))
    assert layout.grids is not None
    return list(tokens.reshape(-1, tokens.shape[-1]).split([height * width for height, width in layout.grids]))


def _split_output(output: Tensor | None, layout: MediaLayout) -> tuple[list[Tensor], list[Tensor]]:
    """Split a projector's output by entry or, where that isn't possible, by medium; the other list is empty."""
    if output is None:
        return [], []
    if output.ndim == 3 and len(output) == sum(layout.entries) and not layout.packed:
        return list(output.unbind(0)), []
    flat = output.reshape(-1, output.shape[-1])
    ends = list(accumulate(layout.tokens))
    if not ends or ends[-1] != len(flat):
        raise AnalysisError(
            f"the projector returned {list(output.shape)}, which can't be divided into media of {list(layout.tokens)} "
            "tokens: the model's family must say in layout() how many tokens each takes in the language model"
        )
    return [], list(flat.split(list(layout.tokens)))


def _part(output: tuple[list[Tensor], list[Tensor]], entry: int, medium: int) -> Tensor | None:
    per_entry, per_medium = output
    return per_entry[entry] if per_entry else per_medium[medium] if per_medium else None


def _to_device(value: Any, model: nn.Module) -> Any:
    if not isinstance(value, Tensor):
        return [_to_device(part, model) for part in value] if isinstance(value, list) else value
    device = next(model.parameters()).device
    return value if device.type == "meta" else value.to(device)  # offloaded: hooks move what they need


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Keep all modules out of training mode in the block, and put them back into it after."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _output_of(projector: nn.Module, outputs: list[Tensor]) -> Iterator[None]:
    thread = get_ident()

    def record(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        # Other threads may be using the model, and the projector may embed token ids, too.
        if get_ident() == thread and first_tensor(args, kwargs) is not None:
            outputs.append(joined(output).detach().float().cpu())

    handle = projector.register_forward_hook(record, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
