"""Weights, attention and masks, against the formulas in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from emma_adapter import AnalysisError, EmmaAlignment, EmmaConfig, patch_model
from emma_adapter.analysis import attention_maps, attention_mass, mask_statistics, token_movement, weight_shares
from tests.analysis.test_movement import trained
from tests.support import tiny
from tests.support.formulas import normed, resized
from tests.support.zoo import ZOO, Row

ROWS = [
    Row(("how many dogs are there?",), images=((112, 56),), seed=1),
    Row(("is there a cat?",), images=((56, 56), (28, 84)), seed=2),
]


def linear(**changes) -> EmmaAlignment:
    config = EmmaConfig(
        fusion="linear", visual_dim=6, instruction_dim=5, visual_grid=(2, 3), max_instruction_tokens=4, **changes
    )
    alignment = EmmaAlignment(config)
    tiny.train_randomly(alignment)
    return alignment


@pytest.mark.parametrize("rank", [None, 2])
def test_shares_of_weights_are_those_of_the_matrix_that_is_applied(rank):
    """The columns of the map are read off what it does to unit vectors."""
    alignment = linear(rank=rank).double()
    fusion = alignment.fusion
    with torch.no_grad():
        fusion.bias.zero_()
        blank = torch.full((1, 4), False)
        nothing = torch.zeros(6, 4, 5, dtype=torch.float64)
        units = torch.eye(6, dtype=torch.float64)[:, :, None].expand(-1, -1, 6)
        image = alignment(units, nothing, blank.expand(6, -1))[..., 0].T
    text = fusion.text_weight.detach().numpy()
    image = image.numpy()
    shares = weight_shares(alignment)
    total = np.abs(image).sum(1) + np.abs(text).sum(1)
    np.testing.assert_allclose(shares.image, np.abs(image).sum(1) / total, rtol=1e-9)
    np.testing.assert_allclose(shares.instruction, np.abs(text) / total[:, None], rtol=1e-9)
    np.testing.assert_allclose(shares.image + shares.instruction.sum(1), 1, rtol=1e-12)
    np.testing.assert_allclose(shares.image_norms, np.sqrt((image**2).sum(0)), rtol=1e-9)
    np.testing.assert_allclose(shares.instruction_norms, np.sqrt((text**2).sum(0)), rtol=1e-9)


def test_an_untrained_adapter_is_all_image(model):
    shares = weight_shares(patch_model(model, EmmaConfig(fusion="linear")))
    assert (shares.image == 1).all() and (shares.instruction == 0).all()
    assert (shares.image_norms == 1).all()


def explicit_attention(adapter, entry_map, visual, instruction):
    """Softmax in float64, of one image: ``[heads, N, T]``."""
    p = {name.rpartition("cross_attention.")[2]: value.detach().double() for name, value in adapter.named_parameters()}
    query = normed(visual, p["visual_norm.weight"], p["visual_norm.bias"]) @ p["query.weight"].T + p["query.bias"]
    native = adapter.config.visual_grid
    position = p["position"]
    if native != entry_map:
        position = resized(position, native, entry_map, antialias=False)
    query = query + position
    key = normed(instruction, p["instruction_norm.weight"], p["instruction_norm.bias"]) @ p["key.weight"].T
    query, key = (x.unflatten(-1, (4, -1)).transpose(0, 1) for x in (query, key))
    scores = (query @ key.mT / query.shape[-1] ** 0.5).exp()
    return scores / scores.sum(-1, keepdim=True)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "idefics3"])
@pytest.mark.parametrize("fusion", ["attention", "modulation"])
def test_attention_is_the_softmax_of_the_formula(name, fusion):
    model, adapter = trained(ZOO[name], fusion)
    batch = ZOO[name].batch(ROWS)
    seen = []
    handle = adapter.alignment.register_forward_hook(
        lambda module, args, kwargs, out: seen.append((args, kwargs)), with_kwargs=True
    )
    maps = attention_maps(model, batch)
    handle.remove()
    [(args, kwargs)] = seen
    visual, instruction, mask = (part.detach() for part in args)
    packing = kwargs.get("packing")
    shapes = [one.shape[1:-1] for one in maps]
    if packing is None:
        pieces, rows = list(visual.double()), range(len(visual))
    else:
        pieces, rows = list(visual.double().reshape(-1, visual.shape[-1]).split(packing.lengths)), packing.rows.tolist()
        if packing.orders is not None:
            raster = [torch.empty_like(piece) for piece in pieces]
            for piece, target, grid in zip(pieces, raster, packing.grids, strict=True):
                target[packing.orders[grid]] = piece
            pieces = raster
    expected = []
    for piece, row, shape in zip(pieces, rows, shapes, strict=True):
        own = instruction[row][mask[row].bool()].double()
        expected.append(explicit_attention(adapter, tuple(shape), piece, own))
    for found, want in zip(maps, expected, strict=True):
        np.testing.assert_allclose(found.reshape(want.shape), want, atol=1e-4)
    mass = attention_mass(model, [batch])
    longest = max(one.shape[-1] for one in expected)
    padded = [nn.functional.pad(one.mean(1), (0, longest - one.shape[-1])) for one in expected]
    np.testing.assert_allclose(mass.heads, torch.stack(padded).mean(0), atol=1e-5)
    np.testing.assert_allclose(mass.positions, mass.heads.mean(0))
    assert mass.positions.sum() == pytest.approx(1) and mass.uniform.sum() == pytest.approx(1)
    entropy = [-(one * one.log()).sum(-1).mean() / np.log(one.shape[-1]) for one in expected]
    assert mass.entropy == pytest.approx(float(np.mean(entropy)), abs=1e-5)
    assert mass.entries == len(maps)
    # Over two batches, entries count alike.
    both = attention_mass(model, [ZOO[name].batch(ROWS[:1]), ZOO[name].batch(ROWS[1:])])
    np.testing.assert_allclose(both.heads, mass.heads, atol=1e-5)


def test_masks_are_what_the_model_multiplied_with():
    model, adapter = trained(ZOO["qwen2_vl"], "modulation")
    batch = ZOO["qwen2_vl"].batch(ROWS)
    seen = []
    handle = adapter.alignment.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    statistics = mask_statistics(model, [batch])
    handle.remove()
    [(before, after)] = seen
    factors = (after / before).detach().double().flatten(0, -2).numpy()
    np.testing.assert_allclose(statistics.mean, factors.mean(0), atol=1e-4)
    np.testing.assert_allclose(statistics.std, factors.std(0), atol=1e-3)
    assert statistics.suppressed == pytest.approx((factors < 0.5).mean(), abs=1e-3)
    assert statistics.amplified == pytest.approx((factors > 1.5).mean(), abs=1e-3)
    counts = np.histogram(factors, statistics.edges)[0]
    np.testing.assert_allclose(statistics.histogram, counts / counts.sum(), atol=2e-3)
    assert statistics.entries == len(token_movement(model, batch))


def test_an_empty_instruction_is_looked_at_by_nobody():
    model, _ = trained(ZOO["llava"], "modulation")
    batch = {**ZOO["llava"].batch([Row(images=((28, 28),))]), "instruction": torch.zeros(1, 3, dtype=torch.long)}
    batch["instruction_mask"] = torch.zeros(1, 3, dtype=torch.long)
    [weights] = attention_maps(model, batch)
    assert weights.shape == (4, 2, 2, 0)
    assert (mask_statistics(model, [batch]).mean == 1).all()
    with pytest.raises(AnalysisError):
        attention_mass(model, [batch])
