"""MoDA's module: its function, its released weights, and what the library adds to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from emma_adapter import CheckpointError, ConfigError, EmmaAlignment, EmmaConfig, Packing

D, F, H, L = 32, 24, 4, 2
PARTS = ("q", "k", "v")


@pytest.fixture(scope="module")
def decoder() -> nn.Module:
    """PyTorch's own, float64, with values that float32 holds."""
    torch.manual_seed(3)
    layer = nn.TransformerDecoderLayer(D, H, F, dropout=0.1, activation="gelu", batch_first=True)
    made = nn.TransformerDecoder(layer, L)
    for parameter in made.parameters():
        nn.init.normal_(parameter, mean=0.1, std=0.3)
    return made.double().eval()


@pytest.fixture(scope="module")
def mask_head() -> Tensor:
    return torch.randn(D, D, generator=torch.Generator().manual_seed(4)).double()


def for_llava(decoder: nn.Module, mask_head: Tensor, prefix: str = "model.moda.") -> dict[str, Tensor]:
    """What the authors' LLaVA writes: the decoder, and the layer that it was copied from."""
    own = {f"decoder.{name}": value for name, value in decoder.state_dict().items()}
    template = {f"decoder_layer.{name}": torch.zeros_like(v) for name, v in decoder.layers[0].state_dict().items()}
    tensors = {**own, **template, "mask_head.weight": mask_head}
    return {prefix + name: value.float().contiguous() for name, value in tensors.items()}


def for_qwen(decoder: nn.Module, mask_head: Tensor) -> dict[str, Tensor]:
    """What the authors' Qwen3-VL writes: a layer of nn.Linear."""
    tensors = {"mask_head.weight": mask_head}
    for number, layer in enumerate(decoder.layers):
        for short, attention in (("sa", layer.self_attn), ("ca", layer.multihead_attn)):
            for kind in ("weight", "bias"):
                for part, value in zip(PARTS, getattr(attention, f"in_proj_{kind}").chunk(3), strict=True):
                    tensors[f"layers.{number}.{short}_{part}.{kind}"] = value
                tensors[f"layers.{number}.{short}_out.{kind}"] = getattr(attention.out_proj, kind)
        for theirs, name in (("linear1", "ff1"), ("linear2", "ff2"), *((f"norm{i}", f"norm{i}") for i in (1, 2, 3))):
            for kind in ("weight", "bias"):
                tensors[f"layers.{number}.{name}.{kind}"] = getattr(getattr(layer, theirs), kind)
    return {f"model.moda_adapter.{name}": value.detach().float().contiguous() for name, value in tensors.items()}


def paper(decoder: nn.Module, mask_head: Tensor, visual: Tensor, instruction: Tensor) -> Tensor:
    """``V * sigmoid(W F(T, V))``, in float64."""
    visual, instruction = visual.double(), instruction.double()
    with torch.no_grad():
        return visual * torch.sigmoid(decoder(visual, instruction) @ mask_head.float().double().mT)


def inputs(batch: int = 3, n: int = 7, t: int = 5) -> tuple[Tensor, Tensor]:
    torch.manual_seed(5)
    return torch.randn(batch, n, D), torch.randn(batch, t, D)


def written(folder: Path, tensors: dict[str, Tensor], name: str = "model.safetensors") -> Path:
    save_file(tensors, folder / name)
    return folder / name


@pytest.fixture(autouse=True)
def _exact(decoder):
    # The float64 reference holds what the file holds.
    decoder.load_state_dict({name: value.float().double() for name, value in decoder.state_dict().items()})


@pytest.mark.parametrize("form", ["llava", "legacy llava", "qwen"])
def test_released_weights_compute_the_papers_function(form, decoder, mask_head, tmp_path):
    tensors = {
        "llava": lambda: for_llava(decoder, mask_head),
        "legacy llava": lambda: for_llava(decoder, mask_head, "model.masking."),
        "qwen": lambda: for_qwen(decoder, mask_head),
    }[form]()
    around = {"lm_head.weight": torch.zeros(3, D), "model.embed_tokens.weight": torch.zeros(3, D)}
    alignment = EmmaAlignment.from_moda(written(tmp_path, {**around, **tensors}), num_heads=H).eval()
    visual, instruction = inputs()
    expected = paper(decoder, mask_head, visual, instruction)
    torch.testing.assert_close(alignment(visual, instruction).double(), expected, atol=1e-5, rtol=0)
    assert alignment.config.place == "after_projector"
    assert alignment.config.fusion_options["mask_scale"] == 1.0


def test_a_folder_of_shards_tells_its_heads(decoder, mask_head, tmp_path):
    tensors = for_qwen(decoder, mask_head)
    names = sorted(tensors)
    for number, chosen in enumerate((names[::2], names[1::2])):
        written(tmp_path, {name: tensors[name] for name in chosen}, f"model-{number}.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_vl", "moda_num_heads": H}))
    alignment = EmmaAlignment.from_moda(tmp_path).eval()
    assert alignment.config.num_heads == H
    visual, instruction = inputs()
    expected = paper(decoder, mask_head, visual, instruction)
    torch.testing.assert_close(alignment(visual, instruction).double(), expected, atol=1e-5, rtol=0)


def test_a_masked_instruction_and_packed_images_are_the_same_function(decoder, mask_head, tmp_path):
    alignment = EmmaAlignment.from_moda(written(tmp_path, for_llava(decoder, mask_head)), num_heads=H).eval()
    visual, instruction = inputs(batch=2, n=6)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    padded = alignment(visual, instruction, mask)
    torch.testing.assert_close(padded[:1], alignment(visual[:1], instruction[:1, :3]))
    packing = Packing([(1, 4), (2, 3)], torch.tensor([1, 0]))
    packed = alignment(torch.cat([visual[0, :4], visual[1]]), instruction, mask, packing=packing)
    torch.testing.assert_close(packed[:4], alignment(visual[:1, :4], instruction[1:])[0])
    torch.testing.assert_close(packed[4:], alignment(visual[1:], instruction[:1], mask[:1])[0])


def make(**changes: Any) -> EmmaAlignment:
    settings = {"visual_dim": D, "instruction_dim": D, "inner_dim": F, "num_heads": H, **changes}
    return EmmaAlignment(EmmaConfig.moda(**settings))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
def test_an_untrained_module_is_the_identity(dtype, training):
    visual, instruction = inputs()
    large = (1000 * visual).to(dtype)
    assert torch.equal(make().train(training)(large, instruction), large)


def test_what_is_not_finite_stays_and_reaches_nothing_else():
    alignment = make().eval()
    nn.init.normal_(alignment.fusion.mask.weight)
    visual, instruction = inputs()
    broken = visual.clone()
    broken[0, 2] = torch.nan
    broken[1] = torch.inf
    found = alignment(broken, instruction)
    assert torch.equal(found[0, 2], broken[0, 2]) or bool(found[0, 2].isnan().all())
    assert torch.equal(found[1], broken[1])
    assert bool(found[0, [0, 1, 3]].isfinite().all())
    torch.testing.assert_close(found[2], alignment(visual, instruction)[2])
    seen = torch.tensor([0, 1, 3, 4, 5, 6])
    # As if the broken token weren't there.
    torch.testing.assert_close(found[0, seen], alignment(visual[:1, seen], instruction[:1])[0])
    found.nan_to_num(0, 0, 0).sum().backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in alignment.parameters())


def test_an_empty_instruction_changes_nothing():
    alignment = make().eval()
    nn.init.normal_(alignment.fusion.mask.weight)
    visual, instruction = inputs()
    mask = torch.tensor([[0] * 5, [1] * 5, [1] * 5])
    found = alignment(visual, instruction, mask)
    assert torch.equal(found[0], visual[0])
    assert not torch.equal(found[1], visual[1])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"instruction_dim": D + 1}, "of one width"),
        ({"num_heads": 3, "inner_dim": 24}, "num_heads"),
        ({"fusion_options": {"layers": 2}}, "no option"),
        ({"fusion_options": {"num_layers": 1.5}}, "num_layers"),
        ({"fusion_options": {"dropout": 1}}, "dropout"),
        ({"fusion_options": {"mask_scale": True}}, "mask_scale"),
    ],
)
def test_what_does_not_fit_is_an_error(changes, says):
    with pytest.raises(ConfigError, match=says):
        make(**changes)


def _without(tensors: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if not name.endswith(names)}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: {"lm_head.weight": torch.zeros(2)}, "holds no module"),
        (lambda t: _without(t, "mask_head.weight"), "lacks its mask_head"),
        (lambda t: _without(t, "layers.1.sa_q.weight"), "don't fit each other"),
        (lambda t: {**t, "model.moda_adapter.layers.0.gate.weight": torch.zeros(2)}, "unknown tensor"),
        (lambda t: {**t, "model.moda_adapter.layers.0.sa_q.bias": torch.full((D,), torch.nan)}, "finite"),
        (lambda t: {**t, "model.moda_adapter.layers.70.sa_q.bias": torch.zeros(D)}, "num_layers"),
    ],
)
def test_a_file_that_is_not_modas_is_an_error(change, says, decoder, mask_head, tmp_path):
    with pytest.raises(CheckpointError, match=says):
        EmmaAlignment.from_moda(written(tmp_path, change(for_qwen(decoder, mask_head))), num_heads=H)


def test_a_source_that_is_not_there_or_empty_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="there is no file"):
        EmmaAlignment.from_moda(tmp_path / "absent.safetensors")
    with pytest.raises(CheckpointError, match="there are no safetensors"):
        EmmaAlignment.from_moda(tmp_path)


@pytest.mark.parametrize("text", ["{", '{"moda_num_heads": "four"}'])
def test_a_config_that_does_not_tell_its_heads_is_an_error(text, decoder, mask_head, tmp_path):
    written(tmp_path, for_qwen(decoder, mask_head))
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="download or copy it again"):
        EmmaAlignment.from_moda(tmp_path)
