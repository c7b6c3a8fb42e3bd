"""Times, path, velocity, guidance and solvers, against their formulas."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.distributions import Normal, SigmoidTransform, TransformedDistribution

from emma_adapter.errors import ConfigError
from emma_adapter.unified.flow import (
    changed_latents,
    guide,
    interpolate,
    sampling_times,
    shift,
    step,
    training_times,
    velocity_loss,
)

from .small import seeded

DEVICE = torch.device("cpu")


@pytest.mark.parametrize("amount", [0.5, 1.0, 3.0])
def test_times_have_the_density_that_they_are_named_after(amount):
    made = training_times(20_000, 2, "logit_normal", 1.0, generator=seeded(), device=DEVICE).flatten()
    logit_normal = TransformedDistribution(Normal(0.0, 1.0), [SigmoidTransform()])
    for t in (0.1, 0.3, 0.5, 0.8):
        assert (made < t).double().mean().item() == pytest.approx(logit_normal.cdf(torch.tensor(t)).item(), abs=0.01)
    shifted = training_times(20_000, 2, "logit_normal", amount, generator=seeded(), device=DEVICE).flatten()
    torch.testing.assert_close(shifted, amount * made / (1 + (amount - 1) * made))


def test_uniform_times_are_stratified_over_the_draws_of_a_prompt():
    t = training_times(500, 4, "uniform", 1.0, generator=seeded(), device=DEVICE)
    assert t.shape == (500, 4) and t.min() >= 0 and t.max() < 1
    quarters = (t * 4).long().sort(1).values
    assert torch.equal(quarters, torch.arange(4).expand(500, 4))
    assert t[:, 0].mean().item() == pytest.approx(0.5, abs=0.05)


def test_sampling_times_are_shifted_once():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    # Sigmas that are given are shifted once there; those that it makes itself, twice.
    scheduler.set_timesteps(sigmas=[1 - number / 7 for number in range(7)])
    torch.testing.assert_close(
        torch.tensor(sampling_times(7, 3.0)), scheduler.sigmas.double(), atol=1e-6, rtol=0, check_dtype=False
    )
    assert sampling_times(4, 1.0) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert sampling_times(99, 3.0, sigmas=[1.0, 0.3]) == [1.0, 0.3, 0.0]
    assert shift(torch.tensor(0.5), 3.0) == 0.75


@pytest.mark.parametrize("sigmas", [[], [0.5, 0.5], [0.2, 0.6], [1.5, 0.5], [0.5, 0.0], [float("nan")]])
def test_sigmas_must_fall(sigmas):
    with pytest.raises(ConfigError, match="sigmas"):
        sampling_times(3, 1.0, sigmas)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_the_true_velocity_leads_back_to_the_picture(solver):
    x0, noise = torch.randn(2, 3, 4, generator=seeded(1)), torch.randn(2, 3, 4, generator=seeded(2))
    x, times = noise, sampling_times(5, 3.0)
    for time, following in pairwise(times):
        torch.testing.assert_close(x, interpolate(x0, noise, torch.tensor([time, time])), atol=1e-6, rtol=0)
        x = step(lambda x, t: noise - x0, x, time, following, solver)
    torch.testing.assert_close(x, x0, atol=1e-6, rtol=0)


def test_heun_is_of_second_order():
    """dx/dt = x has the solution x(0) = x(1) / e."""
    errors = {}
    for solver in ("euler", "heun"):
        for steps in (20, 40):
            # Ends before 0, where Heun's rule falls back to Euler's.
            times = [1 - 0.9 * number / steps for number in range(steps + 1)]
            x = torch.ones((), dtype=torch.float64)
            for time, following in pairwise(times):
                x = step(lambda x, t: x, x, time, following, solver)
            errors[solver, steps] = abs(x.item() - torch.tensor(-0.9, dtype=torch.float64).exp().item())
    assert errors["euler", 20] / errors["euler", 40] == pytest.approx(2, abs=0.2)
    assert errors["heun", 20] / errors["heun", 40] == pytest.approx(4, abs=0.4)


def test_guidance_is_that_of_instruct_pix2pix():
    both, image, none = torch.randn(3, 2, 5, dtype=torch.float64, generator=seeded()).unbind(0)
    wanted = none + 1.5 * (image - none) + 4.0 * (both - image)
    torch.testing.assert_close(guide(both, image, none, 4.0, 1.5), wanted)
    torch.testing.assert_close(guide(both, image, None, 4.0, 1.0), image + 4.0 * (both - image))
    assert guide(both, None, None, 1.0, 1.0) is both


def test_every_picture_counts_alike_and_padding_not_at_all():
    x0, noise, v = torch.randn(3, 2, 2, 6, 4, generator=seeded()).unbind(0)
    weights = torch.tensor([[1.0] * 6, [1.0, 4.0, 0, 0, 0, 0]])
    error = (v - (noise - x0)).double() ** 2
    first = error[0].mean()
    second = (error[1, :, 0].mean() + 4 * error[1, :, 1].mean()) / 5
    torch.testing.assert_close(velocity_loss(v, x0, noise, weights).double(), (first + second) / 2)


def test_changed_latents_are_those_that_an_edit_changes():
    source = torch.zeros(2, 4, 3)
    target = source.clone()
    target[0, 2] = 1.0
    target[0, 3] = 0.5
    assert changed_latents(source, target).tolist() == [[False, False, True, False], [False] * 4]
