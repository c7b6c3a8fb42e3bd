"""The kernel of keys and values on CPU tensors, against LayerNorm and products in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from emma_adapter import EmmaAlignment, EmmaConfig, KernelError
from emma_adapter.kernels.cross_attention import instruction, keys_and_values
from tests.kernels.precision import DTYPES, TOLERANCES
from tests.support.budget import budget

pytestmark = pytest.mark.usefixtures("poisoned_memory")

every_dtype = pytest.mark.parametrize("dtype", budget([torch.bfloat16], DTYPES), ids=str)
PARAMETERS = ("norm_weight", "norm_bias", "key_weight", "value_weight", "value_bias")


def make(rows: int, length: int, width: int, inner: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Values that ``dtype`` holds exactly."""
    generator = torch.Generator().manual_seed(width)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(dtype).float()

    return {
        "tokens": normal(rows, length, width),
        "norm_weight": (1 + normal(width, scale=0.2)).to(dtype).float(),
        "norm_bias": normal(width, scale=0.2),
        "key_weight": normal(inner, width, scale=width**-0.5),
        "value_weight": normal(inner, width, scale=width**-0.5),
        "value_bias": normal(inner),
        "query_weight": torch.randn(inner, 80, generator=generator),
        "output_weight": torch.randn(80, inner, generator=generator),
    }


def formula(tokens, mask, *, norm_weight, norm_bias, key_weight, value_weight, value_bias, **_):
    if mask is not None:
        tokens = tokens.masked_fill(~mask[..., None], 0)
    normed = F.layer_norm(tokens, tokens.shape[-1:], norm_weight, norm_bias)
    return normed @ key_weight.T, normed @ value_weight.T + value_bias


LENGTHS = {"none": None, "ragged": [13, 0, 1, 40, 7], "none valid": [0] * 5}


@every_dtype
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("stored", ["float32", "as the tokens"])
def test_keys_and_values_and_their_gradients(lengths, stored, dtype):
    """More than one tile of tokens, channels and columns, and a width that 16 doesn't divide."""
    given = make(5, 40, 136, 48, dtype)
    mask = None if lengths is None else torch.arange(40) < torch.tensor(lengths)[:, None]
    results = {}
    for name, function, own, weights in (
        ("found", keys_and_values, dtype, torch.float32 if stored == "float32" else dtype),
        ("usual", formula, dtype, dtype),
        ("exact", formula, torch.float64, torch.float64),
    ):
        tokens = given["tokens"].detach().to(own).requires_grad_()
        leaves = {key: tensor.detach().to(weights).requires_grad_() for key, tensor in given.items() if key != "tokens"}
        key, value, *_ = function(tokens, mask, **leaves)
        generator = torch.Generator().manual_seed(1)
        valid = torch.ones(5, 40, dtype=torch.bool) if mask is None else mask
        # Backward of the attention has no gradient for keys that nobody read.
        factors = [torch.randn(5, 40, 48, generator=generator) * valid[..., None] for _ in range(2)]
        torch.autograd.backward((key, value), [factor.to(own) for factor in factors])
        gradients = {key: leaves[key].grad for key in PARAMETERS}
        assert all(gradients[key].dtype == leaves[key].dtype for key in PARAMETERS)
        results[name] = {"key": key[valid], "value": value[valid], "tokens": tokens.grad, **gradients}
        if name == "found":
            assert not key[~valid].any() and not value[~valid].any()
    forward, backward = TOLERANCES[dtype]
    for name, exact in results["exact"].items():
        if not exact.numel():
            continue
        scale = exact.abs().max().clamp_min(1e-6)
        found, usual = ((results[own][name].double() - exact).abs().max() / scale for own in ("found", "usual"))
        assert found <= (forward if name in ("key", "value") else backward), name
        assert found <= 2 * usual + torch.finfo(dtype).eps, name


@every_dtype
def test_the_other_weights_are_cast_beside_them(dtype):
    given = make(2, 3, 24, 48, dtype)
    *_, cast = keys_and_values(given.pop("tokens").to(dtype), None, **given)
    if dtype == torch.float32:
        assert cast is None
        return
    query, output = cast
    assert torch.equal(query, given["query_weight"].to(dtype).flatten())
    assert torch.equal(output, given["output_weight"].to(dtype).flatten())
    given = {name: tensor.to(dtype) for name, tensor in given.items()}
    assert keys_and_values(torch.zeros(2, 3, 24, dtype=dtype), None, **given)[2] is None


@every_dtype
def test_what_padding_holds_is_not_read(dtype):
    given = make(2, 9, 24, 32, dtype)
    tokens, mask = given.pop("tokens").to(dtype), torch.arange(9) < torch.tensor([[4], [0]])
    broken = torch.where(mask[..., None], tokens, torch.nan)
    clean, other = (
        [torch.nan_to_num(t, 1e4) for t in keys_and_values(own, mask, **given)[:2]] for own in (tokens, broken)
    )
    assert all(map(torch.equal, clean, other))


def test_nothing_is_kept_from_one_call_to_the_next():
    """``param.data`` is written to without a new version, by optimisers and averaging among others."""
    config = EmmaConfig(fusion="attention", kernel="triton", visual_dim=48, instruction_dim=24, inner_dim=64)
    torch.manual_seed(0)
    alignment, fresh = EmmaAlignment(config), EmmaAlignment(config)
    v, t = torch.randn(1, 5, 48).half(), torch.randn(1, 3, 24).half()
    with torch.no_grad():
        before = alignment(v, t)
        for parameter in alignment.parameters():
            parameter.data.copy_(torch.randn_like(parameter) * 0.3)
        fresh.load_state_dict(alignment.state_dict())
        after = alignment(v, t)
        assert not torch.equal(after, before)
        assert torch.equal(after, fresh(v, t))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_operators_pass_pytorchs_own_checks(dtype):
    given = make(2, 5, 24, 32, dtype)
    tokens, mask = given.pop("tokens").to(dtype), torch.arange(5) < torch.tensor([[5], [2]])
    given = {name: tensor.requires_grad_(name in PARAMETERS) for name, tensor in given.items()}
    arguments = (tokens.requires_grad_(), mask, *given.values(), 1e-5)
    torch.library.opcheck(instruction._instruction, arguments, rtol=1e-2, atol=1e-2)
    gradient = torch.randn(2, 5, 32).to(dtype)
    weights = [given[name].detach() for name in PARAMETERS[:-1]]
    for need_tokens in (True, False):
        backward = (gradient, gradient, tokens.detach(), mask, *weights, 1e-5, need_tokens)
        torch.library.opcheck(instruction._instruction_backward, backward)


def test_forward_mode_is_refused():
    given = make(1, 3, 24, 32, torch.float32)
    tokens = given.pop("tokens")
    with pytest.raises(KernelError, match="forward-mode"):
        torch.func.jvp(lambda t: keys_and_values(t, None, **given)[0], (tokens,), (tokens,))
