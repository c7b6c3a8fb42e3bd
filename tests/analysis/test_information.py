"""Mutual information: on samples whose information is known, and against scikit-learn's estimators."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.feature_selection import mutual_info_classif, mutual_info_regression

from emma_adapter.analysis import information_gain, mutual_information, pair_distances
from emma_adapter.analysis.calibration import calibrate_classes, calibrate_gaussians
from emma_adapter.analysis.estimators import ksg, ross
from tests.analysis.test_movement import trained
from tests.support.budget import budget
from tests.support.zoo import ZOO, Row


def gaussians(n: int, d: int, nats: float, seed: int, *, concentrated: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """x and y whose information is ``nats``: in d pairs of correlation rho, ``-d log(1 - rho^2) / 2``, or in one."""
    rng = np.random.default_rng(seed)
    pairs = 1 if concentrated else d
    rho = math.sqrt(1 - math.exp(-2 * nats / pairs))
    x, y = rng.standard_normal((n, d)), rng.standard_normal((n, d))
    y[:, :pairs] = rho * x[:, :pairs] + math.sqrt(1 - rho**2) * y[:, :pairs]
    return x @ rng.standard_normal((d, d)), y @ rng.standard_normal((d, d))


@pytest.mark.parametrize(
    ("n", "d"), budget([(200, 1), (400, 2), (250, 8)], [(200, 1), (200, 2), (400, 2), (200, 4), (250, 8)])
)
def test_gaussians_come_out_within_the_stated_error(n, d):
    outside = 0
    for nats in (0.0, 0.5, 1.0, 2.0):
        for seed in range(3):
            found = mutual_information(*gaussians(n, d, nats, seed), seed=seed)
            low, high = found.interval
            outside += not low <= nats <= high
            # And the interval says something.
            assert found.error < 0.35
            assert abs(found.nats - nats) < 4 * found.error + 0.02
    assert outside <= 2, "of twelve intervals of 95 %"


@pytest.mark.parametrize("nats", [0.5, 1.0])
def test_information_in_one_of_several_directions(nats):
    outside = 0
    for seed in range(4):
        low, high = mutual_information(*gaussians(300, 4, nats, seed, concentrated=True), seed=seed).interval
        outside += not low <= nats <= high
    assert outside <= 1


def test_what_is_too_much_for_so_few_samples_is_called_so():
    x, y = gaussians(100, 2, 0.5, 0)
    assert not mutual_information(x, y).saturated
    found = mutual_information(x, x * 2)
    assert found.saturated and found.interval[1] == math.inf


def test_the_correction_is_worth_it():
    """Uncorrected, the estimate is low by far more than the error."""
    found = [mutual_information(*gaussians(300, 8, 2.0, seed), seed=seed) for seed in range(3)]
    assert all(one.raw < 1.2 and one.bias < -0.8 for one in found)
    assert abs(np.mean([one.nats for one in found]) - 2) < 0.4


@pytest.mark.parametrize("distance", [0.0, 1.5, 4.0])
def test_gaussian_classes_come_out_within_the_stated_error(distance):
    """Four classes on the axes: the truth is a mean of exact log densities over many samples."""
    centres = np.eye(4, 5) * distance
    rng = np.random.default_rng(7)
    drawn = rng.integers(0, 4, 200_000)
    points = centres[drawn] + rng.standard_normal((len(drawn), 5))
    squared = -((points[:, None] - centres) ** 2).sum(-1) / 2
    own = squared[np.arange(len(drawn)), drawn]
    truth = float((own - np.log(np.exp(squared - squared.max(1, keepdims=True)).mean(1)) - squared.max(1)).mean())
    outside = 0
    for seed in range(4):
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, 4, 300)
        x = centres[labels] + rng.standard_normal((300, 5))
        found = mutual_information(x, [f"class {label}" for label in labels], seed=seed)
        low, high = found.interval
        outside += not low <= truth <= high
        assert found.estimator == "ross" and found.dims == (5, 0)
    assert outside <= 1


@pytest.mark.parametrize("seed", range(4))
def test_the_estimators_are_scikit_learns_in_one_dimension(seed):
    x, y = gaussians(300, 1, 0.8, seed)
    x, y = x / x.std(), y / y.std()
    [other] = mutual_info_regression(x, y[:, 0], n_neighbors=3, random_state=0)
    assert ksg(x, y, 3) == pytest.approx(other, abs=1e-3)
    labels = np.digitize(y[:, 0], [-1, 0.3])
    [other] = mutual_info_classif(x, labels, n_neighbors=3, discrete_features=False, random_state=0)
    assert ross(x, labels, 3) == pytest.approx(other, abs=1e-3)


def naive_ksg(x, y, k):
    n, total = len(x), 0.0
    for i in range(n):
        in_x = [max(abs(a - b) for a, b in zip(x[i], x[j], strict=True)) for j in range(n) if j != i]
        in_y = [max(abs(a - b) for a, b in zip(y[i], y[j], strict=True)) for j in range(n) if j != i]
        radius = sorted(map(max, zip(in_x, in_y, strict=True)))[k - 1]
        for one in (in_x, in_y):
            total += float(torch.digamma(torch.tensor(1.0 + sum(d < radius for d in one), dtype=torch.float64)))
    psi = torch.digamma(torch.tensor([float(k), float(n)], dtype=torch.float64)).sum()
    return float(psi) - total / n


@settings(max_examples=budget(5, 15))
@given(st.integers(5, 25), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 99))
def test_the_estimator_is_the_papers_formula(n, dx, dy, k, seed):
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((n, dx)), rng.standard_normal((n, dy))
    assert ksg(x, y, k) == pytest.approx(naive_ksg(x.tolist(), y.tolist(), k), abs=1e-9)


def test_blocks_of_the_distance_matrix_make_no_difference(monkeypatch):
    x, y = gaussians(200, 2, 0.5, 0)
    labels = np.digitize(y[:, 0], [0])
    whole = ksg(x, y), ross(x, labels)
    monkeypatch.setattr("emma_adapter.analysis.estimators._BLOCK", 777)
    assert (ksg(x, y), ross(x, labels)) == pytest.approx(whole, abs=1e-12)


def test_rare_labels_tell_nothing():
    rng = np.random.default_rng(0)
    x, labels = rng.standard_normal((100, 2)), np.arange(100)
    assert ross(x, labels) == 0
    labels[:50], labels[50:90] = 0, 1
    pair = ross(x[:90], labels[:90])
    assert ross(x, labels) == pytest.approx(pair)


def test_shuffled_pairs_tell_nothing_of_each_other():
    found = mutual_information(*gaussians(300, 2, 1.0, 0))
    assert abs(found.shuffled) < 4 * found.shuffled_spread
    assert found.raw > found.shuffled + 5 * found.shuffled_spread


def test_units_and_directions_make_no_difference():
    x, y = gaussians(200, 3, 0.8, 0)
    found = mutual_information(x, y)
    turned = np.linalg.qr(np.random.default_rng(1).standard_normal((3, 3)))[0]
    other = mutual_information(x @ turned * 1e4 + 5, y * 1e-4)
    # Distances between ranks tie, and rounding breaks the ties.
    assert other.nats == pytest.approx(found.nats, abs=0.02)
    assert found.explained == pytest.approx((1, 1))


def test_calibration_knows_what_it_draws():
    even = calibrate_gaussians(300, (2, 3), np.array([0.5, 0.5]), 3, 0)
    assert even.truth[0] == 0 and abs(even.mean[0]) < 0.1
    assert (np.diff(even.mean[3:]) > 0).all()
    labels = np.repeat([0, 1, 2], 60)
    classes = calibrate_classes(np.eye(3)[labels], labels, 3, 0)
    assert abs(classes.truth[0]) < 0.01
    assert classes.truth[-1] == pytest.approx(math.log(3), abs=0.02)
    assert classes.mean[-1] == pytest.approx(math.log(3), abs=0.05)


# ---------------------------------------------------------------------------------------------- of a model's tokens


def rows_and_batches(entry, number: int = 60):
    texts = ["is there a cat?", "how many dogs are there?", "what colour is the left bird?"]
    rows = [Row((texts[i % 3],), images=((28, 28),), seed=i) for i in range(number)]
    return [i % 3 for i in range(number)], [entry.batch(rows[start : start + 20]) for start in range(0, number, 20)]


@pytest.mark.parametrize("where", ["visual", "projected"])
def test_an_adapter_that_writes_the_question_into_the_tokens_gains_information_about_it(where):
    """Each picture is asked one of three questions, drawn regardless of it."""
    entry = ZOO["llava"]
    model, adapter = trained(entry)
    with torch.no_grad():
        adapter.alignment.fusion.cross_attention.output.weight.mul_(20)
    asked, batches = rows_and_batches(entry)
    gain = information_gain(model, batches, [str(one) for one in asked], where=where, dims=2)
    low, high = gain.before.interval
    assert low <= 0.05 and high < 0.6
    assert gain.after.nats > 0.7 * math.log(3)
    assert gain.difference == gain.after.nats - gain.before.nats
    assert gain.difference_interval[0] > 0
    assert gain.ratio_interval[0] > 1
    assert gain.ratio > gain.ratio_interval[0]


def test_an_untrained_adapter_gains_nothing():
    entry = ZOO["llava"]
    from emma_adapter import patch_model

    model = entry.model()
    patch_model(model, processor=entry.processor())
    asked, batches = rows_and_batches(entry)
    brightness = torch.cat([batch["pixel_values"] for batch in batches]).flatten(1)[:, :40].numpy()
    for responses in (asked, brightness):
        gain = information_gain(model, batches, responses, dims=2, pool=lambda tokens: tokens[0])
        assert gain.before.nats == gain.after.nats
        assert gain.difference_interval == pytest.approx((0, 0), abs=1e-6)
        assert math.isnan(gain.ratio) if gain.before.nats == 0 else gain.ratio == 1


def test_ratios_with_no_upper_end():
    from emma_adapter.analysis.information import MutualInformation, _divided, _fieller

    def one(nats, error):
        return MutualInformation(nats, error, 0, 0, 0, 0, 0, False, "ksg", 100, (2, 2), (1, 1))

    low, high = _fieller(one(1.5, 0.1), one(1.0, 0.1), 0.0)
    assert low < 1.5 < high < 2.2
    # Monte Carlo: the share of samples in it.
    rng = np.random.default_rng(0)
    ratios = rng.normal(1.5, 0.1, 100_000) / rng.normal(1.0, 0.1, 100_000)
    assert np.mean((ratios > low) & (ratios < high)) == pytest.approx(0.95, abs=0.01)
    low, high = _fieller(one(1.5, 0.1), one(0.1, 0.1), 0.0)
    assert 3 < low < 15 and high == math.inf
    assert _divided(1.0, 0.0) == math.inf
    assert math.isnan(_divided(0.0, 0.0))


def test_distances_of_pairs():
    entry = ZOO["qwen2_vl"]
    model, adapter = trained(entry, "modulation")
    first, second = ([Row(images=((56, 56),), seed=i + shift) for i in range(3)] for shift in (0, 50))
    seen = []
    handle = adapter.alignment.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    pairs = [(entry.batch(first[:2]), entry.batch(second[:2])), (entry.batch(first[2:]), entry.batch(first[2:]))]
    found = pair_distances(model, pairs)
    handle.remove()
    for number, name in enumerate(("before", "after")):
        one, other = (seen[i][number].detach().double().reshape(2, -1) for i in (0, 1))
        want = (one - other).norm(dim=1) / ((one.square().sum(1) + other.square().sum(1)) / 2).sqrt()
        np.testing.assert_allclose(getattr(found, name), [*want, 0], rtol=1e-5)
    np.testing.assert_allclose(found.ratio[:2], found.after[:2] / found.before[:2])
    assert math.isnan(found.ratio[2])
