"""Statistics of ``attention`` and ``modulation``: attention to the instruction, and factors of the channel mask."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..alignment.fusion import ModulationFusion
from ..alignment.fusion.cross_attention import CrossAttention, CrossAttentionFusion
from ..errors import AnalysisError
from ..instructions.pipeline import Instruction
from .observing import Model, VisualEntry, alignment_of, observe, observed_batches

#: A factor of the mask below the first suppresses, one above the second amplifies.
SUPPRESSED, AMPLIFIED = 0.5, 1.5


@dataclass(frozen=True, eq=False)
class AttentionMass:
    """Attention of visual tokens to instruction positions, over a data set; float64.

    Position 0 is the first token of an instruction; T is the longest of the data. Masses add up to 1.
    """

    #: ``[T]``, mean over visual tokens, heads and images.
    positions: NDArray[np.float64]
    #: ``[heads, T]``, mean over visual tokens and images.
    heads: NDArray[np.float64]
    #: ``[T]``, what ``positions`` would be if every visual token attended evenly to its whole instruction.
    uniform: NDArray[np.float64]
    #: Mean entropy of a head's attention as a share of the largest possible, ``log`` of the instruction's length:
    #: 1 is even attention, 0 is a single token. NaN if all instructions have one token.
    entropy: float
    #: Number of images, tiles and frames counted.
    entries: int


@dataclass(frozen=True, eq=False)
class MaskStatistics:
    """The factors ``2 sigmoid(update)`` that ``modulation`` multiplies visual tokens with, over a data set; float64."""

    #: ``[D]``, mean and standard deviation of each channel's factor.
    mean: NDArray[np.float64]
    std: NDArray[np.float64]
    #: Shares of all factors below 0.5 and above 1.5.
    suppressed: float
    amplified: float
    #: ``[41]`` bin edges from 0 to 2 and ``[40]`` shares of all factors.
    edges: NDArray[np.float64]
    histogram: NDArray[np.float64]
    #: Number of images, tiles and frames counted.
    entries: int


def attention_mass(model: Model, batches: Iterable[Mapping[str, Any]]) -> AttentionMass:
    """Return how attention is distributed over the positions of the instructions of a data set.

    It is computed from the adapter's weights and inputs, in float32. Visual tokens of images whose instruction is
    empty, which the adapter leaves unchanged, don't count.

    Args:
        model: a patched model with ``fusion="attention"`` or ``"modulation"``, or its handle.
        batches: outputs of the processor, such as a ``DataLoader`` gives.

    Raises:
        PatchError: if the model is not patched.
        AnalysisError: if the adapter has another fusion, or there is nothing to analyse.
    """
    attention = _cross_attention(model)
    mass, uniform = torch.zeros(attention.num_heads, 0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
    entropy_sum, entropy_count, entries = 0.0, 0, 0
    for batch in observed_batches(model, batches):
        for entry in (entry for _, row in batch for entry in row):
            weights = _weights(attention, entry)
            if weights is None:
                continue
            length = weights.shape[-1]
            if length > len(uniform):
                mass = torch.nn.functional.pad(mass, (0, length - mass.shape[1]))
                uniform = torch.nn.functional.pad(uniform, (0, length - len(uniform)))
            mass[:, :length] += weights.mean(1)
            uniform[:length] += 1 / length
            entries += 1
            if length > 1:
                entropy_sum += float(torch.special.entr(weights).sum(-1).mean()) / math.log(length)
                entropy_count += 1
    if not entries:
        raise AnalysisError("no image of these batches has an instruction that attention could look at")
    mass /= entries
    return AttentionMass(
        positions=mass.mean(0).numpy(),
        heads=mass.numpy(),
        uniform=(uniform / entries).numpy(),
        entropy=entropy_sum / entropy_count if entropy_count else math.nan,
        entries=entries,
    )


def attention_maps(
    model: Model, inputs: Mapping[str, Any], instruction: Instruction | None = None
) -> list[NDArray[np.float32]]:
    """Return the attention of each visual token of a call to each instruction token.

    Args:
        model: a patched model with ``fusion="attention"`` or ``"modulation"``, or its handle.
        inputs: what the model's processor returned.
        instruction: as the call's own ``instruction=``.

    Returns:
        For each image, tile and frame in order, float32 ``[heads, H, W, T]`` over the T valid tokens of its instruction
        (``[heads, N, T]`` where visual tokens form no grid); T is 0 for an empty instruction.

    Raises:
        PatchError: if the model is not patched.
        AnalysisError: if the adapter has another fusion or is disabled, or the call has no image.
    """
    attention = _cross_attention(model)
    maps = []
    for entry in observe(model, inputs, instruction):
        weights = _weights(attention, entry)
        if weights is None:
            weights = torch.zeros(attention.num_heads, len(entry.before), 0)
        maps.append(weights.float().reshape(len(weights), *entry.shape, weights.shape[-1]).numpy())
    return maps


def mask_statistics(model: Model, batches: Iterable[Mapping[str, Any]]) -> MaskStatistics:
    """Return statistics of the factors that ``modulation`` multiplies channels with, over a data set.

    Args:
        model: a patched model with ``fusion="modulation"``, or its handle.
        batches: outputs of the processor, such as a ``DataLoader`` gives.

    Raises:
        PatchError: if the model is not patched.
        AnalysisError: if the adapter has another fusion, or there is nothing to analyse.
    """
    attention = _cross_attention(model)
    if not isinstance(alignment_of(model).fusion, ModulationFusion):
        raise AnalysisError('a mask over channels is what fusion="modulation" has; this adapter adds its update')
    edges = torch.linspace(0, 2, 41, dtype=torch.float64)
    counts = torch.zeros(40, dtype=torch.float64)
    total, squares, tokens, entries = torch.zeros(()), torch.zeros(()), 0, 0
    suppressed = amplified = 0
    for batch in observed_batches(model, batches):
        for entry in (entry for _, row in batch for entry in row):
            factors = _factors(attention, entry)
            total, squares = total + factors.sum(0), squares + factors.square().sum(0)
            tokens, entries = tokens + len(factors), entries + 1
            suppressed += int((factors < SUPPRESSED).sum())
            amplified += int((factors > AMPLIFIED).sum())
            counts += torch.histogram(factors.flatten(), edges).hist
    mean, numbers = total / tokens, tokens * len(total)
    return MaskStatistics(
        mean=mean.numpy(),
        std=(squares / tokens - mean.square()).clamp_min(0).sqrt().numpy(),
        suppressed=suppressed / numbers,
        amplified=amplified / numbers,
        edges=edges.numpy(),
        histogram=(counts / counts.sum()).numpy(),
        entries=entries,
    )


def _cross_attention(model: Model) -> CrossAttention:
    alignment = alignment_of(model)
    if not isinstance(alignment.fusion, CrossAttentionFusion):
        raise AnalysisError(
            f"this adapter's fusion, {alignment.config.fusion!r}, attends to nothing: weight_shares tells what the "
            'weights of "linear" say of each position'
        )
    return alignment.fusion.cross_attention


@torch.no_grad()
def _weights(attention: CrossAttention, entry: VisualEntry) -> Tensor | None:
    """Return attention, float64 ``[heads, N, T]``, over the valid instruction tokens; None if there are none."""
    instruction = _valid_instruction(entry)
    if not len(instruction):
        return None
    visual = _on_device(entry.before, attention)
    query = attention.query(attention.visual_norm(visual))
    positions = attention.positions(len(visual), entry.grid)
    if positions is not None:
        query = query + positions.float()
    key = attention.key(attention.instruction_norm(_on_device(instruction, attention)))
    query, key = (x.double().unflatten(-1, (attention.num_heads, -1)).transpose(0, 1) for x in (query, key))
    return (query @ key.mT / math.sqrt(query.shape[-1])).softmax(-1).cpu()


@torch.no_grad()
def _factors(attention: CrossAttention, entry: VisualEntry) -> Tensor:
    """Return the mask's factors, float64 ``[N, D]``."""
    instruction = _valid_instruction(entry)
    if not len(instruction):
        return torch.ones(entry.before.shape, dtype=torch.float64)
    visual, tokens = (_on_device(x, attention)[None] for x in (entry.before, instruction))
    update = attention(visual, tokens, None, entry.grid)[0]
    return (2 * torch.sigmoid(update.double())).cpu()


def _valid_instruction(entry: VisualEntry) -> Tensor:
    return entry.instruction if entry.instruction_mask is None else entry.instruction[entry.instruction_mask]


def _on_device(x: Tensor, attention: CrossAttention) -> Tensor:
    return x.to(attention.query.weight.device)
