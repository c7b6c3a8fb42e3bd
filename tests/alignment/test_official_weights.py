from __future__ import annotations

import math
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from emma_adapter import CheckpointError, EmmaAlignment, EmmaConfig
from tests.support.budget import budget

SMALL = {"n": 9, "t": 5, "d": 8, "dt": 6}
REAL = {"n": 576, "t": 77, "d": 1024, "dt": 768}
PREFIX = "model.vision_tower."
both_key_forms = pytest.mark.parametrize("prefix", ["", PREFIX], ids=["bare", "prefixed"])
both_containers = pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "legacy"])


def stored(
    *, n: int, t: int, d: int, dt: int, prefix: str = "", dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """What the authors' Trainer writes: the trained layers between the frozen towers."""
    # Their fusion weight is made [N + T, N] and permuted, so it lies transposed in the file.
    fusion = torch.randn(n + t, n) * 0.02
    fusion[:n] += torch.eye(n)
    tensors = {
        "vision_tower.vision_model.embeddings.class_embedding": torch.randn(d),
        "vision_tower.vision_model.embeddings.position_ids": torch.arange(n + 1)[None],
        "vision_tower.vision_model.post_layernorm.weight": torch.randn(d),
        "text_projection.weight": torch.randn(d, dt) / math.sqrt(dt),
        "text_projection.bias": torch.randn(d) * 0.1,
        "image_text_infusion.weight": fusion.permute(1, 0),
        "image_text_infusion.bias": torch.randn(n) * 0.1,
        "text_encoder.text_model.final_layer_norm.bias": torch.randn(dt),
    }
    return {prefix + key: value.to(dtype) if value.is_floating_point() else value for key, value in tensors.items()}


def write(folder: Path, content: Any, *, as_zip: bool = True) -> Path:
    path = folder / "vision_tower.bin"
    torch.save(content, path, _use_new_zipfile_serialization=as_zip)
    return path


def paper(tensors: dict[str, Tensor], prefix: str, v: Tensor, instruction: Tensor) -> Tensor:
    """The formula over all tokens in a row, in float64: cat, permute, linear, permute."""
    p = {key.removeprefix(prefix): value.double() for key, value in tensors.items()}
    hidden = instruction.double() @ p["text_projection.weight"].T + p["text_projection.bias"]
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    together = torch.cat((v.double(), hidden), dim=1).permute(0, 2, 1)
    return (together @ p["image_text_infusion.weight"].T + p["image_text_infusion.bias"]).permute(0, 2, 1)


def inputs(batch: int, *, n: int, t: int, d: int, dt: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, n, d), torch.randn(batch, t, dt)


def assert_refused(path: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        EmmaAlignment.from_official(path)
    assert isinstance(caught.value, ValueError)
    for word in (str(path), *words):
        assert word in str(caught.value)


# --- what it computes -----------------------------------------------------------------------------------------


@both_key_forms
@both_containers
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_equals_the_formula(tmp_path, prefix, as_zip, dtype):
    tensors = stored(**SMALL, prefix=prefix, dtype=dtype)
    alignment = EmmaAlignment.from_official(write(tmp_path, tensors, as_zip=as_zip))
    v, instruction = inputs(3, **SMALL)
    want = paper(tensors, prefix, v, instruction)
    assert (want - v).abs().max() > 0.1
    out = alignment(v, instruction)
    assert out.dtype == torch.float32
    assert (out.double() - want).abs().max() <= 1e-5
    assert {p.dtype for p in alignment.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_the_formula_at_the_real_size(tmp_path, dtype):
    tensors = stored(**REAL, prefix=PREFIX, dtype=dtype)
    alignment = EmmaAlignment.from_official(write(tmp_path, tensors))
    v, instruction = inputs(1, **REAL)
    want = paper(tensors, PREFIX, v, instruction)
    assert (want - v).abs().max() > 0.1
    with torch.no_grad():
        assert (alignment(v, instruction).double() - want).abs().max() <= 1e-5


@settings(max_examples=budget(8, 25))
@given(
    n=st.integers(1, 20),
    t=st.integers(1, 8),
    d=st.integers(1, 12),
    dt=st.integers(1, 12),
    batch=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_equals_the_formula_at_any_size(tmp_path_factory, n, t, d, dt, batch, seed):
    torch.manual_seed(seed)
    sizes = {"n": n, "t": t, "d": d, "dt": dt}
    tensors = stored(**sizes)
    alignment = EmmaAlignment.from_official(write(tmp_path_factory.mktemp("any"), tensors))
    v, instruction = inputs(batch, **sizes)
    assert (alignment(v, instruction).double() - paper(tensors, "", v, instruction)).abs().max() <= 1e-5


def test_an_untrained_checkpoint_is_the_identity(tmp_path):
    tensors = stored(**SMALL)
    n = SMALL["n"]
    tensors["image_text_infusion.weight"] = torch.eye(n + SMALL["t"])[:, :n].permute(1, 0)
    tensors["image_text_infusion.bias"] = torch.zeros(n)
    v, instruction = inputs(2, **SMALL)
    alignment = EmmaAlignment.from_official(write(tmp_path, tensors))
    assert torch.equal(alignment(v, instruction).view(torch.int32), v.view(torch.int32))


def test_config_is_the_papers(tmp_path):
    config = EmmaAlignment.from_official(write(tmp_path, stored(**SMALL))).config
    assert config == EmmaConfig.paper(visual_dim=8, instruction_dim=6, visual_grid=(3, 3), max_instruction_tokens=5)
    assert config.num_visual_tokens == 9


def test_visual_tokens_that_are_no_square_have_no_grid(tmp_path):
    config = EmmaAlignment.from_official(write(tmp_path, stored(n=10, t=5, d=8, dt=6))).config
    assert (config.num_visual_tokens, config.visual_grid) == (10, None)


def test_path_may_be_a_string(tmp_path):
    path = write(tmp_path, stored(**SMALL))
    from_path, from_text = EmmaAlignment.from_official(path), EmmaAlignment.from_official(str(path))
    for name, value in from_path.state_dict().items():
        assert torch.equal(value, from_text.state_dict()[name])


def test_result_outlives_the_file_and_trains(tmp_path):
    """The file is mapped while it is read; the weights must not be views of it."""
    path = write(tmp_path, stored(**SMALL))
    before = path.read_bytes()
    alignment = EmmaAlignment.from_official(path)
    v, instruction = inputs(2, **SMALL)
    out = alignment(v, instruction)
    out.square().mean().backward()
    assert all(p.requires_grad and p.grad.abs().max() > 0 for p in alignment.parameters())
    with torch.no_grad():
        for parameter in alignment.parameters():
            parameter.add_(1)
    assert path.read_bytes() == before
    changed = alignment(v, instruction)
    path.write_bytes(b"\0" * len(before))
    assert torch.equal(alignment(v, instruction), changed)


# --- what it refuses ------------------------------------------------------------------------------------------


class Payload:
    """Creates a marker file if it is ever unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("place", ["value", "key", "whole", "plain-pickle", "weight"])
@pytest.mark.parametrize("forced", [False, True], ids=["default", "forced-unsafe"])
@both_containers
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_payloads_never_run(tmp_path, monkeypatch, place, forced, as_zip):
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    marker = tmp_path / "marker"
    payload, tensors = Payload(marker), stored(**SMALL)
    if place == "plain-pickle":
        path = tmp_path / "vision_tower.bin"
        path.write_bytes(pickle.dumps({**tensors, "extra": payload}, protocol=2 if as_zip else 4))
    else:
        content = {
            "value": {**tensors, "extra": payload},
            "key": {**tensors, payload: torch.zeros(1)},
            "weight": {**tensors, "text_projection.weight": payload},
            "whole": payload,
        }[place]
        path = write(tmp_path, content, as_zip=as_zip)
    assert_refused(path)
    assert not marker.exists()


def test_the_payload_would_run(tmp_path):
    """Else the test above could not fail."""
    path = write(tmp_path, {**stored(**SMALL), "extra": Payload(tmp_path / "marker")})
    torch.load(path, weights_only=False)
    assert (tmp_path / "marker").exists()


NAMES = ["text_projection.weight", "text_projection.bias", "image_text_infusion.weight", "image_text_infusion.bias"]


@both_key_forms
@pytest.mark.parametrize("name", NAMES)
def test_missing_tensor(tmp_path, prefix, name):
    tensors = stored(**SMALL, prefix=prefix)
    del tensors[prefix + name]
    assert_refused(write(tmp_path, tensors), name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [None, "weight", 3.0, [1.0, 2.0]])
def test_no_tensor_under_the_name(tmp_path, name, value):
    assert_refused(write(tmp_path, {**stored(**SMALL), name: value}), name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64], ids=str)
def test_tensors_that_are_no_weights(tmp_path, name, dtype):
    tensors = stored(**SMALL)
    tensors[name] = tensors[name].to(dtype)
    assert_refused(write(tmp_path, tensors), name, str(dtype))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("text_projection.weight", (8,)),
        ("text_projection.weight", ()),
        ("text_projection.weight", (8, 6, 1)),
        ("text_projection.weight", (7, 6)),
        ("text_projection.weight", (8, 0)),
        ("text_projection.bias", (7,)),
        ("text_projection.bias", (8, 1)),
        ("text_projection.bias", ()),
        ("image_text_infusion.weight", (9,)),
        ("image_text_infusion.weight", (9, 14, 1)),
        ("image_text_infusion.weight", (9, 9)),
        ("image_text_infusion.weight", (9, 8)),
        ("image_text_infusion.weight", (14, 9)),
        ("image_text_infusion.weight", (10, 14)),
        ("image_text_infusion.bias", (10,)),
        ("image_text_infusion.bias", (9, 1)),
        ("image_text_infusion.bias", ()),
    ],
)
def test_wrong_shape(tmp_path, name, shape):
    tensors = {**stored(**SMALL), name: torch.zeros(shape)}
    assert_refused(write(tmp_path, tensors), name.split(".")[0])


@pytest.mark.parametrize(
    ("layer", "shape"), [("text_projection", (0, 6)), ("image_text_infusion", (0, 5))], ids=["no-channels", "no-tokens"]
)
def test_empty_layer(tmp_path, layer, shape):
    empty = {f"{layer}.weight": torch.zeros(shape), f"{layer}.bias": torch.zeros(0)}
    assert_refused(write(tmp_path, {**stored(**SMALL), **empty}), str(list(shape)))


@both_key_forms
def test_learnable_tokens_are_another_variant(tmp_path, prefix):
    tensors = stored(**SMALL, prefix=prefix)
    tensors[prefix + "learnable_tokens"] = torch.zeros(SMALL["n"], SMALL["d"])
    assert_refused(write(tmp_path, tensors), "learnable tokens", "v1")


@both_containers
def test_truncated_file(tmp_path, as_zip):
    path = write(tmp_path, stored(n=2, t=1, d=2, dt=2), as_zip=as_zip)
    whole = path.read_bytes()
    EmmaAlignment.from_official(path)
    for length in [*range(0, len(whole), 7), len(whole) - 1]:
        path.write_bytes(whole[:length])
        assert_refused(path)


NO_CHECKPOINTS = {
    "empty": b"",
    "zero": b"\0",
    "zip-magic": b"PK\x03\x04",
    "zip-of-zeros": b"PK\x03\x04" + b"\0" * 100,
    "git-lfs-pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1232\n",
    "html": b"<!doctype html><title>404</title>",
    "pickle-of-nothing": b"\x80\x02.",
    "digits": b"0" * 40,
    "pickle-of-lists": pickle.dumps({"text_projection.weight": [1.0]}, protocol=2),
}


@pytest.mark.parametrize("content", NO_CHECKPOINTS.values(), ids=NO_CHECKPOINTS)
def test_file_that_is_no_checkpoint(tmp_path, content):
    path = tmp_path / "vision_tower.bin"
    path.write_bytes(content)
    assert_refused(path)


def test_missing_file(tmp_path):
    assert_refused(tmp_path / "vision_tower.bin", "no file")


def test_directory(tmp_path):
    assert_refused(tmp_path)


@both_containers
@pytest.mark.parametrize("content", [[torch.zeros(2)], (), torch.zeros(2), None, 3, "text"], ids=repr)
def test_content_that_is_no_dict(tmp_path, content, as_zip):
    assert_refused(write(tmp_path, content, as_zip=as_zip), type(content).__name__)


@pytest.mark.parametrize(
    "content",
    [{}, {"state_dict": {"text_projection.weight": torch.zeros(8, 6)}}, {1: torch.zeros(2)}],
    ids=["empty", "nested", "numbered"],
)
def test_dict_that_is_no_state_dict(tmp_path, content):
    assert_refused(write(tmp_path, content), "text_projection.weight")
