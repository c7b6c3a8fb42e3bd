"""The fusions that the ablation alone has."""

from __future__ import annotations

import pytest
import torch

from benchmarks.digits_vqa.ablation import recipes, variants
from emma_adapter import EmmaAlignment, EmmaConfig


@pytest.fixture(autouse=True)
def _variants(registry):
    variants.register()


SIZES = EmmaConfig(
    visual_dim=12, instruction_dim=10, num_visual_tokens=4, visual_grid=(2, 2), max_instruction_tokens=5, inner_dim=16
)
IDENTITIES = sorted({*variants.VARIANTS} - {"attention, output not zero-initialised"})


def aligned(fusion, seed=0):
    torch.manual_seed(seed)
    alignment = EmmaAlignment(SIZES.replace(fusion=fusion))
    inputs = torch.randn(2, 4, 12), torch.randn(2, 5, 10)
    return alignment, inputs[0], alignment(*inputs)


@pytest.mark.parametrize("fusion", IDENTITIES)
def test_untrained_variants_are_the_identity_and_learn(fusion):
    alignment, visual_tokens, out = aligned(fusion)
    assert torch.equal(out, visual_tokens)
    optimizer = torch.optim.SGD(alignment.parameters(), lr=0.1)
    torch.nn.functional.mse_loss(out, torch.ones_like(out)).backward()
    optimizer.step()
    assert not torch.equal(alignment(visual_tokens, torch.randn(2, 5, 10)), visual_tokens)


def test_the_output_that_is_not_zero_initialised_is_no_identity():
    _, visual_tokens, out = aligned("attention, output not zero-initialised")
    assert not torch.allclose(out, visual_tokens, atol=1e-3)


def test_a_zero_gate_on_a_zero_output_would_never_learn():
    """Why the arm with the gate has the usual output projection."""
    alignment, _, _ = aligned("attention, scalar zero gate")
    torch.nn.init.zeros_(alignment.fusion.cross_attention.output.weight)
    torch.nn.init.zeros_(alignment.fusion.cross_attention.output.bias)
    alignment(torch.randn(2, 4, 12), torch.randn(2, 5, 10)).square().sum().backward()
    assert all(not parameter.grad.any() for parameter in alignment.parameters())


def test_each_change_of_attention_is_one_change():
    plain = dict(aligned("attention")[0].named_parameters())
    for fusion in recipes.ATTENTION_CHANGES:
        changed = dict(aligned(fusion)[0].named_parameters())
        names = {name.removeprefix("fusion.").removeprefix("cross_attention.") for name in set(plain) ^ set(changed)}
        assert names == {
            "attention, no query term per position": {"position"},
            "attention, scalar zero gate": {"gate"},
        }.get(fusion, set())
    attention = aligned("attention, usual q/k initialisation")[0].fusion.cross_attention
    for weight in (attention.query.weight, attention.key.weight, attention.position):
        assert weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert not attention.output.weight.any()
    # The variance of the query is the same with and without the term per position.
    blind = aligned("attention, no query term per position")[0].fusion.cross_attention
    assert blind.query.weight.std().item() == pytest.approx(1.5 / 12**0.5, rel=0.2)


def test_parts_of_linear():
    """Instruction projection: ``P [D, Dt]`` and p. Alignment: ``W [N, N + T]`` and b."""
    projection, alignment, both = (
        sum(parameter.numel() for parameter in aligned(fusion)[0].parameters())
        for fusion in (*recipes.LINEAR_PARTS, "linear")
    )
    assert (projection, alignment) == (12 * 10 + 12, 4 * (4 + 5) + 4)
    assert both == projection + alignment
    module, visual_tokens, _ = aligned(recipes.LINEAR_PARTS[0])
    torch.nn.init.normal_(module.fusion.instruction_projection.weight)
    instruction = torch.randn(2, 5, 10)
    added = torch.nn.functional.gelu(instruction @ module.fusion.instruction_projection.weight.T).mean(1, keepdim=True)
    torch.testing.assert_close(module(visual_tokens, instruction), visual_tokens + added)


def opened(fusion):
    """Trained, as it were, with visual tokens and an instruction."""
    alignment, visual_tokens, _ = aligned(fusion)
    torch.nn.init.normal_(alignment.fusion.cross_attention.output.weight)
    return alignment, visual_tokens, torch.randn(2, 5, 10)


def test_in_two_steps_visual_tokens_see_one_another():
    for fusion, sees in (("modulation", False), (recipes.TWO_STEPS, True)):
        alignment, visual_tokens, instruction = opened(fusion)
        before = alignment(visual_tokens, instruction)
        visual_tokens[:, 3] += torch.randn(12)
        after = alignment(visual_tokens, instruction)
        assert torch.allclose(before[:, :3], after[:, :3], rtol=1e-5) is not sees


def test_two_steps_read_the_valid_instruction_alone():
    alignment, visual_tokens, instruction = opened(recipes.TWO_STEPS)
    mask = torch.tensor([[True, True, True, False, False], [False] * 5])
    out = alignment(visual_tokens, instruction, mask)
    torch.testing.assert_close(out[:1], alignment(visual_tokens[:1], instruction[:1, :3]))
    assert torch.equal(out[1], visual_tokens[1])
