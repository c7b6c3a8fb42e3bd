"""Flow matching on tensors: times, the path from latents to noise, its velocity, and the steps back.

The path is x_t = (1 - t)·x0 + t·noise (rectified flow, arXiv 2209.03003), with t = 1 noise; the velocity is
dx_t/dt = noise - x0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from ..errors import ConfigError
from ..messages import shown

Solver = Literal["euler", "heun"]


def shift(u: Tensor, amount: float) -> Tensor:
    """Return t = s·u / (1 + (s - 1)·u): times moved towards noise if s > 1 (arXiv 2403.03206, eq. 23)."""
    return amount * u / (1 + (amount - 1) * u)


def training_times(
    rows: int, draws: int, density: str, amount: float, *, generator: torch.Generator | None, device: torch.device
) -> Tensor:
    """Return shifted times ``[rows, draws]`` in float32, stratified over the draws of a row.

    ``"uniform"`` puts one draw into each of ``draws`` equal parts of [0, 1); ``"logit_normal"`` is the sigmoid of the
    standard normal's quantiles at these.
    """
    generator_device = device if generator is None else generator.device
    u = torch.rand(rows, 1, generator=generator, device=generator_device)
    u = (u + torch.arange(draws, device=generator_device) / draws) % 1
    if density == "logit_normal":
        # Quantiles of 0 and 1 are infinite; float32 can draw 0.
        u = torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6)).sigmoid()
    return shift(u, amount).to(device)


def interpolate(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Return x_t; ``t`` has fewer dimensions than ``x0``, and belongs to its first ones."""
    t = t.reshape(t.shape + (1,) * (x0.ndim - t.ndim))
    return (1 - t) * x0 + t * noise


def clean_estimate(before: Tensor, after: Tensor, time: float, following: float) -> Tensor:
    """Return x0 = x_t - t·v, the picture that a step of Euler's rule heads for, of the same shape as ``before``.

    Args:
        before: x_t, the latents at ``time``.
        after: x_t + (following - time)·v, the latents that the step led to.
        time: t.
        following: the time of ``after``, not equal to ``time``.
    """
    return before - time * (after - before) / (following - time)


def velocity_loss(velocity: Tensor, x0: Tensor, noise: Tensor, weights: Tensor) -> Tensor:
    """Return the mean over pictures of each picture's mean squared error, so that large ones don't count for more.

    Args:
        velocity: ``[B, R, N, C]``, predicted.
        x0: of the same shape.
        noise: of the same shape.
        weights: ``[B, N]``, of the latents; 0 at padding.
    """
    error = (velocity.float() - (noise - x0).float()).square().mean((1, 3))
    return ((error * weights).sum(1) / weights.sum(1)).mean()


def changed_latents(source: Tensor, target: Tensor) -> Tensor:
    """Return a mask ``[B, N]`` of the latents that an edit changes.

    They are those whose squared difference is more than half of the greatest one in their picture.

    Args:
        source: latents ``[B, N, C]`` before the edit.
        target: latents after it.
    """
    difference = (target - source).square().mean(-1)
    return (difference > 0.5 * difference.amax(-1, keepdim=True)) & (difference > 0)


def sampling_times(steps: int, amount: float, sigmas: Sequence[float] | None = None) -> list[float]:
    """Return ``steps + 1`` times from 1 (noise) to 0, shifted; or ``sigmas`` as they are, with 0 at the end.

    Raises:
        ConfigError: if there would be no step, or ``sigmas`` don't fall within (0, 1].
    """
    if sigmas is not None:
        times = [float(sigma) for sigma in sigmas]
        with_end = [*times, 0.0]
        falls = all(time > following for time, following in pairwise(with_end))
        if not times or not falls or times[0] > 1:
            raise ConfigError(
                f"sigmas must fall within (0, 1], as numpy.linspace(1, 0.05, 20) does; got {shown(times)}"
            )
        return with_end
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ConfigError(f"num_inference_steps must be an integer >= 1; got {steps!r}")
    return shift(torch.linspace(1, 0, steps + 1, dtype=torch.float64), amount).tolist()


def guide(
    conditional: Tensor, without_text: Tensor | None, without_all: Tensor | None, text_scale: float, image_scale: float
) -> Tensor:
    """Return the velocity guided by text and by pictures separately (InstructPix2Pix, arXiv 2211.09800, eq. 3).

    v = v(∅, ∅) + s_I·(v(I, ∅) - v(∅, ∅)) + s_T·(v(I, T) - v(I, ∅)). Without reference pictures, v(I, ∅) is v(∅, ∅).

    Args:
        conditional: v(I, T).
        without_text: v(I, ∅); None if both scales are 1.
        without_all: v(∅, ∅); None if ``image_scale`` is 1, where it has no effect.
        text_scale: s_T.
        image_scale: s_I.
    """
    if without_text is None:
        return conditional
    guided = without_text + text_scale * (conditional - without_text)
    return guided if without_all is None else guided + (image_scale - 1) * (without_text - without_all)


def step(
    velocity: Callable[[Tensor, float], Tensor], x: Tensor, time: float, following: float, solver: Solver
) -> Tensor:
    """Move ``x`` from ``time`` to ``following`` by Euler's or Heun's rule; Heun's last step is Euler's."""
    first = velocity(x, time)
    moved = x + (following - time) * first
    if solver == "euler" or following == 0:
        return moved
    return x + (following - time) * (first + velocity(moved, following)) / 2
