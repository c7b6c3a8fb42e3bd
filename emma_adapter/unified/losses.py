"""The flow-matching loss of pictures behind prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import DataError, ShapeError
from .drawing import VelocityField, grid_of
from .flow import changed_latents, interpolate, training_times, velocity_loss
from .fusion import encode_grouped
from .layers import Prefix
from .pictures import reference_lists, target_tensors
from .pixels import resized
from .prompts import check_length, check_prompts
from .reading import Row, device_of, read_rows
from .state import UnifiedState


def prompted_loss(
    model: nn.Module,
    state: UnifiedState,
    prompts: Any,
    targets: Any,
    images: Any,
    generator: torch.Generator | None,
) -> Tensor:
    """Return the loss of a batch of prompts, target pictures and reference pictures; see ``EmmaUnified.loss``."""
    texts = check_prompts(prompts)
    references = reference_lists(images, len(texts))
    device = device_of(state.family.inner(model))
    channels = state.coder.channels
    if isinstance(targets, Tensor) and targets.ndim == 4 and targets.shape[1] == channels != 3:
        latents = list(targets.to(device))
    else:
        pictures = target_tensors(targets, state.coder.compression)
        latents = encode_grouped(state, [picture.to(device) for picture in pictures])
    if len(latents) != len(texts):
        raise DataError(f"{len(latents)} targets for {len(texts)} prompts: give one for each")
    sources = _sources(state, references, latents)
    rows: list[Row] = [(text, tuple(pictures)) for text, pictures in zip(texts, references, strict=True)]
    if torch.is_grad_enabled():
        rows = dropped(rows, state.config.prompt_dropout, generator)
    return latent_loss(model, state, read_rows(model, state, rows), latents, sources, generator)


def latent_loss(
    model: nn.Module,
    state: UnifiedState,
    prefix: Prefix,
    latents: Sequence[Tensor],
    sources: Sequence[Tensor] | None,
    generator: torch.Generator | None,
) -> Tensor:
    """Return the flow-matching loss of latents behind prompts, a scalar in float32.

    Args:
        model: unified.
        state: its state.
        prefix: B prompts, as the base has read them.
        latents: normalized latents ``[C, h, w]`` of each row's target.
        sources: latents of each row's picture before the edit, the target's where there is none. None: no row has one.
        generator: of noise and times; None: PyTorch's.
    """
    config = state.config
    x0, grid, real = padded(latents)
    if len(x0) != len(prefix.mask):
        raise ShapeError(f"{len(x0)} targets for {len(prefix.mask)} prompts: give one for each")
    check_length(state.family.inner(model), prefix, x0.shape[1])
    weights = real.float()
    if sources is not None and config.changed_weight != 1:
        weights = weights * (1 + (config.changed_weight - 1) * changed_latents(padded(sources)[0], x0))
    draws = config.noise_draws
    t = training_times(
        len(x0), draws, config.timestep_density, config.time_shift, generator=generator, device=x0.device
    )
    x0 = x0[:, None].expand(-1, draws, -1, -1)
    noise = random_normal(x0.shape, generator, x0.device)
    field = VelocityField(model, state, prefix, grid, real, draws)
    velocity = field(interpolate(x0, noise, t), t)
    loss = velocity_loss(velocity, x0, noise, weights)
    # DistributedDataParallel waits for the gradients of all parameters, even in a step where no row has a picture.
    zeros = [parameter.sum() * 0 for parameter in state.module.fusion.parameters() if parameter.requires_grad]
    return loss + torch.stack(zeros).sum().to(loss.dtype) if zeros and torch.is_grad_enabled() else loss


def padded(latents: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return padded latents ``[B, N, C]``, the row and column of each ``[B, N, 2]``, and a mask of the real ones.

    Args:
        latents: ``[C, h, w]`` each; N is the longest's h · w. The mask is ``[B, N]``.
    """
    longest = max(picture[0].numel() for picture in latents)
    sequences = [picture.flatten(1).mT for picture in latents]
    tokens = torch.stack([F.pad(sequence, (0, 0, 0, longest - len(sequence))) for sequence in sequences])
    grids = [grid_of(picture.shape[1], picture.shape[2], picture.device) for picture in latents]
    grid = torch.stack([F.pad(places, (0, 0, 0, longest - len(places))) for places in grids])
    lengths = torch.tensor([len(places) for places in grids], device=tokens.device)
    return tokens, grid, torch.arange(longest, device=tokens.device) < lengths[:, None]


def random_normal(shape: Sequence[int], generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Return standard normal numbers in float32, drawn on the generator's device and moved to ``device``."""
    generator_device = device if generator is None else generator.device
    return torch.randn(tuple(shape), generator=generator, device=generator_device).to(device)


def dropped(rows: Sequence[Row], share: float, generator: torch.Generator | None = None) -> list[Row]:
    """Return rows, of which this share lose their text, and half of those their pictures too.

    Guidance by text and by pictures separately needs a model that has been trained on such rows.
    """
    if share == 0:
        return list(rows)
    device = None if generator is None else generator.device
    u = torch.rand(len(rows), generator=generator, device=device).tolist()
    return [
        (text, pictures) if number >= share else ("", pictures if number >= share / 2 else ())
        for (text, pictures), number in zip(rows, u, strict=True)
    ]


def _sources(state: UnifiedState, references: list[list[Any]], latents: list[Tensor]) -> list[Tensor] | None:
    """Return latents of each row's first reference picture at its target's size, or the target's if there is none.

    None if the loss doesn't depend on them.
    """
    if state.config.changed_weight == 1 or not any(references):
        return None
    edited = [number for number, pictures in enumerate(references) if pictures]
    side = state.coder.compression
    sizes = [(latents[number].shape[1] * side, latents[number].shape[2] * side) for number in edited]
    pictures = resized(target_tensors([references[number][0] for number in edited], 1), sizes)
    encoded = encode_grouped(state, [picture.to(latents[0].device) for picture in pictures])
    sources = dict(zip(edited, encoded, strict=True))
    return [sources.get(number, target) for number, target in enumerate(latents)]
