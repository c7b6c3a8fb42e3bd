"""The second decoder stack against a joint forward of both branches, which routes every token to its own weights."""

from __future__ import annotations

import copy
import itertools
import threading

import pytest
import torch

from emma_adapter import UnifiedConfig
from emma_adapter.modules import private
from emma_adapter.unified.drawing import VelocityField, grid_of
from emma_adapter.unified.layers import text_model_of
from emma_adapter.unified.reading import read_rows
from tests.support.zoo import ZOO
from tests.unified.small import picture, unified

FAMILIES = [
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "llava",
    "llava_next",
    "llava_onevision",
    "llava_pixtral",
    "internvl",
    "gemma3",
    "mistral3",
    "glm4v",
    "glm4v_moe",
    "glm_ocr",
]


def joint(model, tokens, positions, allowed, is_drawn):
    """Hidden states of one forward over prompt and picture tokens together: copies of all layers, where every module
    runs with both branches' weights, and each token keeps what its own made of it. In float64.

    Written with deep copies and hooks of PyTorch, nothing of the library's own views.
    """
    state = model.emma_unified.default
    text = text_model_of(model.model)
    base, other = copy.deepcopy(text), copy.deepcopy(text)
    load(other, state, text)
    pairs = list(zip(base.named_modules(), other.named_modules(), strict=True))
    for (name, module), (_, twin) in pairs:
        if name and not list(module.children()) and list(module.parameters()):
            module.register_forward_hook(route(twin, is_drawn))
        elif hasattr(module, "gate") and hasattr(module, "experts"):
            # A mixture picks experts by token, in an order of its own: routed as a whole.
            module.register_forward_hook(route(twin, is_drawn))
    mask = torch.zeros(allowed.shape, dtype=tokens.dtype).masked_fill(~allowed, torch.finfo(tokens.dtype).min)
    return base(inputs_embeds=tokens, attention_mask=mask[:, None], position_ids=positions, use_cache=False)[0]


def route(twin, is_drawn):
    inside = threading.local()

    def hook(module, args, output):
        if getattr(inside, "on", False):
            return None
        inside.on = True
        try:
            second = twin(*args)
        finally:
            inside.on = False
        first = output[0] if isinstance(output, tuple) else output
        second = second[0] if isinstance(second, tuple) else second
        # Gemma's norms of queries come after heads and tokens have changed places.
        own = is_drawn if first.shape[1] == is_drawn.shape[1] else is_drawn[:, None]
        assert first.shape[own.ndim - 1] == is_drawn.shape[1], f"{type(module).__name__} changes the order of tokens"
        made = torch.where(own.view(own.shape + (1,) * (first.ndim - own.ndim)), second, first)
        return (made, *output[1:]) if isinstance(output, tuple) else made

    return hook


def load(text, module, base):
    """Give a copy of the text model the branch's weights, by what the config says: base + B·A, or the copy."""
    own = [*((f"layers.{n}.", parameters) for n, parameters in enumerate(module.layers)), ("norm.", module.norm)]
    values = dict(text.named_parameters())
    with torch.no_grad():
        for prefix, parameters in own:
            for name, value in parameters.items():
                path, _, kind = name.rpartition("/")
                where = prefix + path.replace("/", ".") + "." * bool(path)
                if kind == "up":
                    values[f"{where}weight"] += value @ parameters[f"{path}/down"]
                elif kind != "down":
                    values[where + kind].copy_(value)


#: A joint forward of a mixture would need a mixture of two mixtures.
MIXTURES = ("qwen3_vl_moe", "glm4v_moe")
JOINT = [(name, "sdpa") for name in FAMILIES if name not in MIXTURES] + [("qwen3_vl", "eager"), ("llava", "eager")]


@pytest.mark.parametrize(("name", "attention"), JOINT)
def test_two_passes_are_one_joint_forward(name, attention):
    """Prompts of several lengths, with and without pictures, several draws, pictures that aren't square."""
    model = ZOO[name].model()
    model.set_attn_implementation(attention)
    model = model.double()
    decoupling = "full" if FAMILIES.index(name) % 2 else 3
    adapter = unified(name, UnifiedConfig(decoupling=decoupling, shared_layers=1), model=model)
    state = adapter._state
    text = text_model_of(model.model)
    rows = [("a red five at the top", ()), ("make it blue", (picture(1, 84, 56),)), ("two", ())]
    seen = {}

    def note(module, args, kwargs, output):
        seen.setdefault("embeds", []).append(kwargs["inputs_embeds"])
        seen.setdefault("positions", []).append(kwargs["position_ids"])

    handle = text.register_forward_hook(note, with_kwargs=True)
    with torch.no_grad():
        prefix = read_rows(model, state, rows)
        handle.remove()
        grid = grid_of(2, 3, torch.device("cpu")).expand(3, -1, -1)
        real = torch.tensor([[True] * 6, [True] * 6, [True] * 4 + [False] * 2])
        draws = 2
        field = VelocityField(model, state, prefix, grid, real, draws)
        x, t = torch.randn(3, draws, 6, 8, dtype=torch.float64), torch.rand(3, draws, dtype=torch.float64)
        got = field(x, t)
        drawn = model.emma_unified.default.embed(x, t, grid).flatten(1, 2)
        passes = list(zip(seen["embeds"], seen["positions"], strict=True))
        for row in range(3):
            own, at = (passes[0], [0, 2].index(row)) if row != 1 else (passes[1], 0)
            length = int(prefix.mask[row].sum())
            if deepstack(model) and row == 1:
                continue  # its visual features enter later layers too, which this joint forward doesn't know
            prompt, positions = own[0][at, -length:], own[1][..., at, -length:]
            tokens = torch.cat([prompt, drawn[row]])[None]
            places = torch.cat([positions, field.positions[..., row, :]], -1)
            places = places[:, None] if places.ndim == 2 else places[None]
            total = len(tokens[0])
            allowed = torch.tril(torch.ones(total, total, dtype=torch.bool))
            number = torch.arange(draws).repeat_interleave(6)
            allowed[length:, length:] = (number[:, None] == number) & real[row].repeat(draws)
            if name == "gemma3" and row == 1:
                # Its pictures are seen in both directions.
                ids = (prompt_ids(adapter, rows[row]) == model.config.image_token_id)[-length:]
                allowed[:length, :length] |= ids[:, None] & ids[None]
            is_drawn = (torch.arange(total) >= length)[None]
            hidden = joint(model, tokens, places, allowed[None], is_drawn)[0, length:]
            want = model.emma_unified.default.read_velocity(hidden).view(draws, 6, 8)
            keep = real[row]
            # transformers' norms and rotations compute in float32, also in a model of float64.
            torch.testing.assert_close(got[row][:, keep], want[:, keep], atol=3e-7, rtol=0)
            assert want[:, keep].std() > 0.1


def deepstack(model) -> bool:
    return hasattr(getattr(model.model, "visual", None), "deepstack_merger_list")


def prompt_ids(adapter, row):
    from emma_adapter.unified.prompts import encode_prompts

    return encode_prompts(adapter._state.processor, [row[0]], [list(row[1])])["input_ids"][0]


def test_what_is_decoupled():
    """The first layers share queries and keys and their norms; the others nothing."""
    adapter = unified("qwen3_vl", UnifiedConfig(decoupling="full", shared_layers=1), trained=False)
    first, second = (set(parameters) for parameters in adapter.model.emma_unified.default.layers)
    assert second - first == {f"self_attn/{part}/weight" for part in ("q_proj", "k_proj", "q_norm", "k_norm")}
    base = text_model_of(adapter.model.model).layers[1]
    assert second == {name.replace(".", "/") for name, _ in base.named_parameters()}
    assert torch.equal(adapter.model.emma_unified.default.layers[1]["mlp/up_proj/weight"], base.mlp.up_proj.weight)


@pytest.mark.parametrize(("shared", "wanted"), [(None, 1), (0, 0), (2, 2)])
def test_half_of_the_layers_share_by_default(shared, wanted):
    adapter = unified("llava", UnifiedConfig(decoupling=2, shared_layers=shared), trained=False)
    owners = ["self_attn/q_proj/up" not in parameters for parameters in adapter.model.emma_unified.default.layers]
    assert sum(owners) == wanted and owners == sorted(owners, reverse=True)


def test_full_and_low_rank_copies_begin_as_the_same():
    fields = []
    for decoupling in ("full", 3):
        torch.manual_seed(0)
        adapter = unified("llava", UnifiedConfig(decoupling=decoupling), trained=False)
        module = adapter.model.emma_unified.default
        with torch.no_grad():
            for parameters in (module.latents, module.time, module.velocity):
                for number, value in enumerate(parameters.values()):
                    value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(number)) * 0.2)
        noise = torch.randn(1, 8, 2, 2, generator=torch.Generator().manual_seed(5))
        fields.append(
            adapter.generate_images(
                "a bird", height=64, width=64, num_inference_steps=2, latents=noise, output_type="latent"
            )
        )
    torch.testing.assert_close(fields[0].images, fields[1].images, atol=1e-5, rtol=1e-5)


def test_the_cache_of_a_prompt_is_only_read():
    adapter = unified("qwen3_vl", UnifiedConfig(decoupling=2))
    with torch.no_grad():
        prefix = read_rows(adapter.model, adapter._state, [("a bird", ())])
        before = [value.clone() for pair in prefix.states for value in pair]
        grid = grid_of(2, 2, torch.device("cpu"))[None]
        field = VelocityField(adapter.model, adapter._state, prefix, grid, torch.ones(1, 4, dtype=torch.bool))
        x, t = torch.randn(1, 1, 4, 8), torch.rand(1, 1)
        one, other = field(x, t), field(x, t)
    assert torch.equal(one, other)
    assert all(map(torch.equal, before, itertools.chain(*prefix.states)))


def test_a_lora_of_the_base_is_no_part_of_the_copies():
    peft = pytest.importorskip("peft")
    adapter = unified("qwen3_vl", UnifiedConfig(decoupling="full", shared_layers=1))
    model = adapter.model
    names = [name for name, _ in model.named_modules() if name.startswith("emma_unified")]
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
    assert names == [name for name, _ in model.named_modules() if name.startswith("emma_unified")]
    del wrapped
    text = text_model_of(model.model)
    stack = model.emma_unified.default.stack(text, torch.float32)
    kinds = [type(layer.self_attn.q_proj).__module__.startswith("peft") for layer in stack.layers]
    assert kinds == [True, False]
    assert not any(type(layer.mlp.up_proj).__module__.startswith("peft") for layer in stack.layers)
    assert private.attention_of(stack.config) == "sdpa"
