from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn

from emma_adapter import (
    CheckpointError,
    EmmaConfig,
    EmmaError,
    EncoderError,
    PatchError,
    get_adapter,
    load_adapter,
    patch_model,
    register_fusion,
    unpatch_model,
)
from emma_adapter.alignment.fusion import registry
from tests.support import ROOT, tiny
from tests.support.budget import budget

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
FUSIONS = {
    "attention": EmmaConfig(fusion="attention", inner_dim=8, num_heads=2),
    "linear": EmmaConfig(fusion="linear", max_instruction_tokens=6),
    "modulation": EmmaConfig(fusion="modulation", inner_dim=16, num_heads=4),
}
ATTENTION = FUSIONS["attention"]
INPUTS = tiny.token_inputs([1, 2, 0])
INSTALLED = ("generate", "save_pretrained")
VOCABULARY = len(tiny.tokenizer())


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """OpenMP's threads don't survive a fork."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def base_model(**changes):
    """``tiny.llava()``, without training a tokenizer each time."""
    return tiny.llava(vocab_size=VOCABULARY, image_token=4, **changes)


def logits(model, inputs=INPUTS):
    pixels = inputs["pixel_values"].to(model.dtype)
    with torch.no_grad():
        return model(**{**inputs, "pixel_values": pixels}).logits


def projector_of(model):
    return model.model.multi_modal_projector


def trained(config=ATTENTION, *, seed=1, projector=False, model=None):
    """A patched model with an adapter that does something."""
    model = base_model() if model is None else model
    adapter = patch_model(model, config)
    tiny.train_randomly(adapter.alignment, seed=seed)
    if projector:
        adapter.train_only(projector=True)
        for layer in (adapter.projector.linear_1, adapter.projector.linear_2):
            tiny.train_randomly(layer, scale=0.1, seed=seed)
    return model


def saved(folder, config=ATTENTION, **options):
    """``trained(...)``, and its adapter in ``folder``."""
    model = trained(config, **options)
    get_adapter(model).save_pretrained(folder)
    return model


def same_values(one, other):
    """Bit for bit, in the same dtypes; NaN equals NaN."""
    return set(one) == set(other) and all(
        one[name].dtype == other[name].dtype
        and one[name].shape == other[name].shape
        and one[name].numpy(force=True).tobytes() == other[name].numpy(force=True).tobytes()
        for name in one
    )


def copied(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def is_untouched(model):
    modules = (model, model.model, projector_of(model))
    return (
        not any(hasattr(module, "_emma") or hasattr(module, "emma") for module in modules)
        and not any(module._forward_hooks or module._forward_pre_hooks for module in modules)
        and not any(name in model.__dict__ for name in INSTALLED)
    )


class Victims:
    """An unpatched and a patched model, which a refused load must leave as they are."""

    def __init__(self):
        self.plain, self.patched = base_model(), trained(seed=7)
        self.before = {model: (copied(model), logits(model)) for model in (self.plain, self.patched)}
        self.config = get_adapter(self.patched).config

    def refuse(self, source, match=None, outputs=True):
        for model, (values, output) in self.before.items():
            with pytest.raises(CheckpointError, match=match) as caught:
                load_adapter(model, source)
            assert isinstance(caught.value, EmmaError)
            assert isinstance(caught.value, ValueError)
            assert same_values(model.state_dict(), values)
            assert not outputs or torch.equal(logits(model), output)
        assert is_untouched(self.plain)
        assert get_adapter(self.patched).config == self.config


@pytest.fixture(scope="module")
def victims():
    return Victims()


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """A good adapter folder; not to be written to."""
    folder = tmp_path_factory.mktemp("intact")
    saved(folder)
    return folder


@pytest.fixture(scope="module")
def reference(intact):
    """``(tensors, logits)`` of the adapter in ``intact``."""
    model = trained()
    return get_adapter(model).alignment.state_dict(), logits(model)


@pytest.fixture(scope="module")
def pair():
    """An unpatched model, to be left so, and a patched one, to be left with any weights."""
    return base_model(), trained(seed=7)


@pytest.fixture
def folder(intact, tmp_path):
    """A private copy of a good adapter folder, to be damaged."""
    return Path(shutil.copytree(intact, tmp_path / "adapter"))


def edit_json(folder, change):
    description = json.loads((folder / CONFIG).read_text())
    change(description)
    (folder / CONFIG).write_text(json.dumps(description))


def edit_tensors(folder, change):
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        metadata = file.metadata()
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    change(tensors)
    safetensors.torch.save_file(tensors, folder / WEIGHTS, metadata=metadata)


# ---------------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize("fusion", FUSIONS)
def test_round_trip_is_bit_identical(fusion, tmp_path):
    model = saved(tmp_path, FUSIONS[fusion])
    base = base_model()
    other = base_model()
    adapter = load_adapter(other, tmp_path)
    assert adapter.config == get_adapter(model).config
    assert same_values(adapter.alignment.state_dict(), get_adapter(model).alignment.state_dict())
    assert torch.equal(logits(other), logits(model))
    assert not torch.equal(logits(other), logits(base))


def test_source_may_be_a_string(intact, reference):
    model = base_model()
    load_adapter(model, str(intact))
    assert torch.equal(logits(model), reference[1])


def test_round_trip_through_a_fresh_process(tmp_path):
    expected = {}
    for name, config in FUSIONS.items():
        expected[name] = logits(saved(tmp_path / name, config))
    expected["projector"] = logits(saved(tmp_path / "projector", projector=True))
    script = """
import os, sys
os.environ["HF_HUB_OFFLINE"] = "1"
import torch
from tests.support import tiny
from emma_adapter import load_adapter
root, out, names = sys.argv[1], sys.argv[2], sys.argv[3:]
answers = {}
for name in names:
    model = tiny.llava()
    load_adapter(model, os.path.join(root, name))
    with torch.no_grad():
        answers[name] = model(**tiny.token_inputs([1, 2, 0])).logits
torch.save(answers, out)
"""
    out = tmp_path / "logits.pt"
    subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), str(out), *expected],
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert same_values(torch.load(out), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("projector", [False, True])
def test_dtype_is_kept(dtype, projector, tmp_path):
    model = trained(projector=projector).to(dtype)
    adapter = get_adapter(model)
    adapter.save_pretrained(tmp_path)
    assert {t.dtype for t in safetensors.torch.load_file(tmp_path / WEIGHTS).values()} == {dtype}
    other = base_model().to(dtype)
    loaded = load_adapter(other, tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert torch.equal(logits(other), logits(model))
    assert torch.isfinite(logits(other)).all()


def test_float32_adapter_beside_a_half_precision_model(tmp_path):
    model = saved(tmp_path, model=base_model().bfloat16())
    other = base_model().bfloat16()
    adapter = load_adapter(other, tmp_path)
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    assert other.dtype == torch.bfloat16
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("projector", [False, True])
def test_keys_do_not_depend_on_the_place(fusion, projector, tmp_path):
    model = saved(tmp_path, FUSIONS[fusion], projector=projector)
    expected = {f"alignment.{name}" for name, _ in get_adapter(model).named_parameters()}
    if projector:
        expected |= {f"projector.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
    assert set(safetensors.torch.load_file(tmp_path / WEIGHTS)) == expected


def test_loading_keeps_parameters_and_what_is_trainable(intact):
    """An optimizer made before loading must go on stepping the adapter."""
    model = trained(seed=2)
    adapter = get_adapter(model).train_only()
    before = dict(adapter.named_parameters())
    trainable = [p.requires_grad for p in model.parameters()]
    load_adapter(model, intact)
    assert all(dict(adapter.named_parameters())[name] is p for name, p in before.items())
    assert [p.requires_grad for p in model.parameters()] == trainable


def test_loading_does_not_change_the_base(intact):
    model, base = base_model(), base_model()
    adapter = load_adapter(model, intact)
    with adapter.disabled():
        assert torch.equal(logits(model), logits(base))
    unpatch_model(model)
    assert same_values(model.state_dict(), base.state_dict())
    assert is_untouched(model)


def test_a_fusion_of_the_users_own_with_buffers_round_trips(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "FUSIONS", dict(registry.FUSIONS))
    register_fusion("test-buffered")(tiny.BufferedFusion)
    model = trained(EmmaConfig(fusion="test-buffered"))
    get_adapter(model).alignment.fusion.scale.uniform_(0.5, 2)
    get_adapter(model).save_pretrained(tmp_path)
    other = base_model()
    load_adapter(other, tmp_path)
    assert torch.equal(logits(other), logits(model))


# ---------------------------------------------------------------------------------------------- files and card


def test_files_written(tmp_path):
    saved(tmp_path / "a" / "b")
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == sorted([CONFIG, WEIGHTS, CARD])


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_file_permissions_are_the_usual_ones(mask, tmp_path):
    before = os.umask(mask)
    try:
        saved(tmp_path / "adapter")
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "adapter").iterdir()}
    assert modes == dict.fromkeys((CONFIG, WEIGHTS, CARD), 0o666 & ~mask)


def test_saving_to_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="file"):
        saved(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def front_matter(folder):
    text = (folder / CARD).read_text(encoding="utf-8")
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("---\n")[1]), text


@pytest.mark.parametrize("fusion", FUSIONS)
def test_card_names_what_was_saved(fusion, tmp_path):
    model = saved(tmp_path, FUSIONS[fusion])
    header, text = front_matter(tmp_path)
    assert header["library_name"] == "emma_adapter"
    assert "base_model" not in header
    assert f"| fusion | `{fusion}` |" in text
    assert "| instruction encoder | `llm` |" in text
    assert f"{get_adapter(model).num_parameters():,}" in text
    assert "as in the base model" in text


def test_card_says_that_the_projector_was_trained(tmp_path):
    saved(tmp_path, projector=True)
    assert "trained with the adapter" in front_matter(tmp_path)[1]


@pytest.mark.parametrize(
    "name",
    [
        "llava-hf/llava-1.5-7b-hf",
        "/models/llava: my #1",
        "C:\\models\\llava",
        "@odd",
        "1e5",
        "null",
        "$base",
        "'a",
        "模型/😀",
    ],
)
def test_card_header_holds_any_base_name(name, tmp_path):
    model = trained()
    model.config._name_or_path = name
    get_adapter(model).save_pretrained(tmp_path)
    header, text = front_matter(tmp_path)
    # The hub refuses a card whose base_model is none of its names.
    assert header.get("base_model") == (name if name == "llava-hf/llava-1.5-7b-hf" else None)
    assert name in text.split("---\n")[2]
    assert json.loads((tmp_path / CONFIG).read_text())["base_model_name_or_path"] == name


def test_generated_card_is_rewritten(folder):
    (folder / CARD).write_text((folder / CARD).read_text() + "\nadded, but the marker is there\n")
    saved(folder, FUSIONS["linear"])
    text = (folder / CARD).read_text()
    assert "added" not in text
    assert "| fusion | `linear` |" in text


@pytest.mark.parametrize("text", [b"# my own card\n", b"\xff\xfe not utf-8"])
def test_card_of_the_user_stays(text, folder):
    (folder / CARD).write_bytes(text)
    saved(folder, FUSIONS["linear"])
    assert (folder / CARD).read_bytes() == text


def test_card_stays_once_its_marker_line_is_removed(folder):
    lines = (folder / CARD).read_text().splitlines(keepends=True)
    kept = "".join(line for line in lines if "generated by emma_adapter" not in line)
    assert len(kept) < sum(map(len, lines))
    (folder / CARD).write_text(kept)
    saved(folder, FUSIONS["linear"])
    assert (folder / CARD).read_text() == kept


@pytest.mark.parametrize("fusion", FUSIONS)
def test_overwriting_an_older_save(fusion, folder):
    """The older one is of another kind, and had its projector trained."""
    saved(folder, projector=True, seed=3)
    model = saved(folder, FUSIONS[fusion], seed=4)
    other = base_model()
    assert load_adapter(other, folder).config == get_adapter(model).config
    assert torch.equal(logits(other), logits(model))
    assert sorted(p.name for p in folder.iterdir()) == sorted([CONFIG, WEIGHTS, CARD])


# ---------------------------------------------------------------------------------------------- patched models


def test_load_into_a_patched_model_of_the_same_config(intact, reference):
    model = trained(seed=9)
    assert not torch.equal(logits(model), reference[1])
    load_adapter(model, intact)
    assert torch.equal(logits(model), reference[1])


def test_cache_size_is_no_difference(intact, reference):
    model = trained(ATTENTION.replace(cache_size=1), seed=9)
    load_adapter(model, intact)
    assert torch.equal(logits(model), reference[1])


@pytest.mark.parametrize(
    "config",
    [
        FUSIONS["modulation"],
        FUSIONS["linear"],
        ATTENTION.replace(num_heads=4),
        ATTENTION.replace(instruction_policy="all_turns"),
    ],
    ids=["fusion", "linear", "heads", "policy"],
)
def test_load_into_a_model_patched_otherwise(config, intact, reference):
    model = trained(config)
    values, output = copied(model), logits(model)
    with pytest.raises(PatchError, match="unpatch_model"):
        load_adapter(model, intact)
    assert same_values(model.state_dict(), values)
    assert torch.equal(logits(model), output)
    unpatch_model(model)
    load_adapter(model, intact)
    assert torch.equal(logits(model), reference[1])


# ---------------------------------------------------------------------------------------------- projector


@pytest.mark.parametrize("already_patched", [False, True])
def test_trained_projector_round_trips_and_gives_way(already_patched, tmp_path, reference):
    model = saved(tmp_path, projector=True)
    other, base = base_model(), base_model()
    if already_patched:
        patch_model(other, ATTENTION)
    adapter = load_adapter(other, tmp_path)
    assert torch.equal(logits(other), logits(model))
    assert not torch.equal(logits(other), reference[1])
    with adapter.disabled():
        assert torch.equal(logits(other), logits(base))
    assert torch.equal(logits(other), logits(model))
    unpatch_model(other)
    assert same_values(other.state_dict(), base.state_dict())
    assert torch.equal(logits(other), logits(base))


def test_two_projectors_one_after_the_other(tmp_path):
    saved(tmp_path / "a", projector=True, seed=1)
    second = saved(tmp_path / "b", projector=True, seed=2)
    model, base = base_model(), base_model()
    load_adapter(model, tmp_path / "a")
    adapter = load_adapter(model, tmp_path / "b")
    assert torch.equal(logits(model), logits(second))
    with adapter.disabled():
        assert torch.equal(logits(model), logits(base))
    unpatch_model(model)
    assert same_values(model.state_dict(), base.state_dict())


def test_adapter_without_projector_after_one_with(tmp_path):
    """The second adapter was trained beside the original projector, and must not meet the first one's."""
    saved(tmp_path / "a", projector=True, seed=1)
    second = saved(tmp_path / "b", seed=2)
    model, base = base_model(), base_model()
    load_adapter(model, tmp_path / "a")
    adapter = load_adapter(model, tmp_path / "b")
    assert torch.equal(logits(model), logits(second))
    with adapter.disabled():
        assert torch.equal(logits(model), logits(base))
    adapter.save_pretrained(tmp_path / "c")
    other = base_model()
    load_adapter(other, tmp_path / "c")
    assert torch.equal(logits(other), logits(second))
    unpatch_model(model)
    assert same_values(model.state_dict(), base.state_dict())


def test_loaded_projector_is_saved_again(tmp_path):
    model = saved(tmp_path / "a", projector=True)
    other = base_model()
    load_adapter(other, tmp_path / "a").save_pretrained(tmp_path / "b")
    third = base_model()
    load_adapter(third, tmp_path / "b")
    assert torch.equal(logits(third), logits(model))


def test_projector_of_another_shape(tmp_path, victims):
    saved(tmp_path, projector=True)
    edit_tensors(tmp_path, lambda t: t.update({"projector.linear_1.weight": torch.zeros(3, 3)}))
    victims.refuse(tmp_path, match=r"linear_1\.weight")


# ---------------------------------------------------------------------------------------------- tensors

SOME = "alignment.fusion.cross_attention.query.weight"


def test_intact_folder_is_not_refused(intact, victims):
    """So that the refusals below have their reason in the damage."""
    with pytest.raises(pytest.fail.Exception):
        Victims().refuse(intact)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop(SOME), r"missing.*query\.weight"),
        (lambda t: t.clear(), "missing"),
        (lambda t: t.update({"alignment.more": torch.zeros(1)}), "unexpected.*more"),
        (lambda t: t.update({"elsewhere": torch.zeros(1)}), "unexpected.*elsewhere"),
        (lambda t: t.update({"model.emma.fusion": torch.zeros(1)}), r"unexpected.*model\.emma"),
        (lambda t: t.update({"projector.linear_1.weight": torch.zeros(32, 32)}), "projector"),
        (lambda t: t.update({SOME: t[SOME].T.contiguous()}), r"query\.weight is \[32, 8\]"),
        (lambda t: t.update({SOME: t[SOME].flatten()}), r"query\.weight is \[256\]"),
        (lambda t: t.update({SOME: t[SOME][None]}), r"query\.weight is \[1, 8, 32\]"),
        (lambda t: t.update({SOME: t[SOME][:0]}), r"query\.weight is \[0, 32\]"),
        (lambda t: t.update({SOME: t[SOME].int()}), "int32"),
        (lambda t: t.update({SOME: t[SOME] > 0}), "bool"),
        (lambda t: t[SOME].view(-1)[5:6].fill_(float("nan")), "NaN"),
        (lambda t: t[SOME].view(-1)[5:6].fill_(float("-inf")), "infinite"),
        (lambda t: t.update({SOME: t[SOME].half().fill_(float("nan"))}), "NaN"),
    ],
)
def test_damaged_tensors(change, match, folder, victims):
    edit_tensors(folder, change)
    victims.refuse(folder, match=match)


@pytest.mark.parametrize("name", ["projector.linear_1.weight", "projector.linear_2.bias"])
@pytest.mark.parametrize("damage", ["missing", "nan", "integer"])
def test_damaged_projector(name, damage, tmp_path, victims):
    saved(tmp_path, projector=True)
    change = {
        "missing": lambda t: t.pop(name),
        "nan": lambda t: t[name].view(-1)[0:1].fill_(float("nan")),
        "integer": lambda t: t.update({name: t[name].int()}),
    }[damage]
    edit_tensors(tmp_path, change)
    victims.refuse(tmp_path, match=name.removeprefix("projector."))


def test_projector_announced_but_not_there(tmp_path, victims):
    saved(tmp_path, projector=True)
    edit_tensors(tmp_path, lambda t: [t.pop(name) for name in list(t) if name.startswith("projector.")])
    victims.refuse(tmp_path, match="projector")


def test_all_problems_are_named_at_once(folder, victims):
    def change(tensors):
        del tensors[SOME]
        tensors["alignment.more"] = torch.zeros(1)
        tensors["alignment.fusion.cross_attention.query.bias"] = torch.zeros(3)

    edit_tensors(folder, change)
    victims.refuse(folder, match=r"(?s)query\.weight.*more.*query\.bias")


def test_file_of_another_tool_under_our_name(folder, victims):
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    safetensors.torch.save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    victims.refuse(folder, match="not written by emma_adapter")


@given(data=st.data())
def test_truncated_tensor_file(data, intact, tmp_path_factory, victims):
    folder = Path(shutil.copytree(intact, tmp_path_factory.mktemp("truncated") / "adapter"))
    content = (folder / WEIGHTS).read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    length = data.draw(st.one_of(st.integers(0, 16), st.integers(0, header), st.integers(0, len(content) - 1)))
    (folder / WEIGHTS).write_bytes(content[:length])
    victims.refuse(folder, match=WEIGHTS, outputs=False)


def test_tensor_file_with_something_behind(folder, victims):
    with (folder / WEIGHTS).open("ab") as file:
        file.write(b"\0" * 16)
    victims.refuse(folder, match=WEIGHTS)


@settings(max_examples=budget(50, 200))
@given(data=st.data())
def test_flipped_header_byte(data, intact, tmp_path_factory, pair, reference):
    """Refused, or what loads is an adapter of the saved kind. Values can't be told wrong without a checksum."""
    folder = Path(shutil.copytree(intact, tmp_path_factory.mktemp("flipped") / "adapter"))
    content = bytearray((folder / WEIGHTS).read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    tensors = content.index(b'"alignment.')
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.one_of(st.integers(0, 7), st.integers(8, header - 1), st.integers(tensors, header - 1)))
        content[at] ^= data.draw(st.integers(1, 255))
    (folder / WEIGHTS).write_bytes(content)
    model = pair[0]
    try:
        adapter = load_adapter(model, folder)
    except CheckpointError:
        assert is_untouched(model)
        return
    found, expected = adapter.alignment.state_dict(), reference[0]
    assert {name: value.shape for name, value in found.items()} == {
        name: value.shape for name, value in expected.items()
    }
    assert all(value.is_floating_point() and value.isfinite().all() for value in found.values())
    assert torch.isfinite(logits(model)).all()
    unpatch_model(model)


# ---------------------------------------------------------------------------------------------- JSON


@given(data=st.data())
def test_truncated_config(data, intact, tmp_path_factory, victims):
    folder = Path(shutil.copytree(intact, tmp_path_factory.mktemp("truncated") / "adapter"))
    content = (folder / CONFIG).read_bytes()
    (folder / CONFIG).write_bytes(content[: data.draw(st.integers(0, len(content.rstrip()) - 1))])
    victims.refuse(folder, match=CONFIG, outputs=False)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"not json",
        b"\xff\xfe{}",
        b"[]",
        b'"emma_adapter"',
        b"null",
        b"3",
        b"{}",
        b'{"format": ["emma_adapter"]}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"1" * 5_000,
    ],
    ids=lambda text: text[:12].decode(errors="replace") + f"[{len(text)}]",
)
def test_config_that_is_no_description(text, folder, victims):
    (folder / CONFIG).write_bytes(text)
    victims.refuse(folder, match=CONFIG)


@pytest.mark.parametrize("field", ["fusion_options", "visual_grid", "fusion"])
@pytest.mark.parametrize("depth", [50, 200, 300, 400, 480, 700, 2_000])
def test_deeply_nested_config(field, depth, folder, victims, reference):
    """Some depths that the parser still reads are too deep for code that walks the value in Python."""
    nested = "[" * depth + "]" * depth
    value = f'{{"a": {nested}}}' if field == "fusion_options" else nested
    description = json.loads((folder / CONFIG).read_text())
    description["config"][field] = "@"
    (folder / CONFIG).write_text(json.dumps(description).replace('"@"', value))
    model = base_model()
    try:
        load_adapter(model, folder)
    except CheckpointError:
        assert is_untouched(model)
    else:
        assert field == "fusion_options", "only these may hold a list of anything"
        assert torch.equal(logits(model), reference[1])


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.floats()
    | st.text(max_size=5)
    | st.just(10**30)
    | st.just("llm"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=3,
)
OUTER_FIELDS = ["format", "format_version", "model_type", "projector_trained", "sha256", "config", "library_version"]
INNER_FIELDS = sorted(EmmaConfig().to_dict())


@settings(max_examples=budget(50, 200))
@given(field=st.sampled_from(OUTER_FIELDS + INNER_FIELDS), value=JSON_VALUES)
def test_any_value_in_any_config_field(field, value, intact, tmp_path_factory, pair, reference):
    """Refused, or an adapter that works: no other exception, and nothing half done."""
    folder = Path(shutil.copytree(intact, tmp_path_factory.mktemp("field") / "adapter"))

    def change(description):
        (description if field in OUTER_FIELDS else description["config"])[field] = value

    edit_json(folder, change)
    for model in pair:
        before, patched = copied(model), model is pair[1]
        try:
            adapter = load_adapter(model, folder)
        except (CheckpointError, PatchError, EncoderError) as error:
            kind = type(error)
            assert same_values(model.state_dict(), before)
            assert is_untouched(model) != patched
            if field in OUTER_FIELDS:
                assert kind is CheckpointError
            else:
                assert kind in (CheckpointError, PatchError if patched else EncoderError)
        else:
            assert same_values(adapter.alignment.state_dict(), reference[0])
            assert torch.isfinite(logits(model)).all()
            if not patched:
                unpatch_model(model)


WRONG = {
    "fusion": [None, 1, ["attention"], {}, "no-such-fusion"],
    "visual_dim": ["32", 32.0, True, 0, -1, [32], {}, None, 10**30],
    "instruction_dim": ["32", 32.0, True, 0, -1, [32], None, 10**30],
    "num_visual_tokens": ["4", 4.0, True, 0, [4], 5],
    "visual_grid": ["2x2", [2], [2, 2, 1], [2.0, 2], [4, 4], 4, [0, 4]],
    "max_instruction_tokens": ["128", 1.5, False, 0],
    "inner_dim": ["8", 8.0, None, True, 0, 7, 16, 2**62],
    "num_heads": ["2", 2.0, None, True, 0, 3],
    "rank": ["1", 1.0, True, 0, [1]],
    "instruction_encoder": [None, 1, "", "  ", ["llm"]],
    "instruction_layer": [None, "-2", 1.0, True],
    "instruction_policy": [None, 1, "no-such-policy", ["last_turn"]],
    "cache_size": [None, "512", -1, 1.0, True],
    "fusion_options": [None, [], 1, "x"],
    "no_such_field": [1, None],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in WRONG.items() for value in values])
def test_wrong_value_in_a_config_field(field, value, folder, victims):
    edit_json(folder, lambda description: description["config"].update({field: value}))
    victims.refuse(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("format", value) for value in (None, 1, "peft", [], {})],
        *[("format_version", value) for value in (None, "1", 1.0, True, 0, -1, [], 2)],
        *[("model_type", value) for value in (None, 1, [], {}, "vipllava")],
        *[("config", value) for value in (None, [], "x", 1, {})],
        *[("projector_trained", value) for value in (True, 1, "yes", [False])],
    ],
)
def test_wrong_value_in_a_field_of_the_description(field, value, folder, victims):
    edit_json(folder, lambda description: description.update({field: value}))
    victims.refuse(folder)


@pytest.mark.parametrize("field", ["format", "format_version", "model_type", "config"])
def test_field_of_the_description_missing(field, folder, victims):
    edit_json(folder, lambda description: description.pop(field))
    victims.refuse(folder)


def test_config_and_tensors_of_different_kinds(folder, tmp_path, victims):
    """Files copied together by hand, with the same checksum: the weights were made for another config."""
    saved(tmp_path / "other", FUSIONS["linear"])
    other = json.loads((tmp_path / "other" / CONFIG).read_text())
    edit_json(folder, lambda description: description.update(config=other["config"]))
    victims.refuse(folder, match=r"changed since it was saved, in .*'fusion'")


@settings(max_examples=budget(10, 25))
@given(data=st.data())
def test_a_flipped_bit_in_the_weights_is_noticed(data):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        saved(folder)
        content = bytearray((folder / WEIGHTS).read_bytes())
        start = 8 + int.from_bytes(content[:8], "little")
        bit = data.draw(st.integers(8 * start, 8 * len(content) - 1))
        content[bit // 8] ^= 1 << bit % 8
        (folder / WEIGHTS).write_bytes(content)
        with pytest.raises(CheckpointError, match=r"damaged|NaN|infinite"):
            load_adapter(tiny.llava(), folder)


def test_a_config_that_was_edited_is_refused_unless_it_changes_no_function(folder, victims):
    original = (folder / CONFIG).read_text()
    edit_json(folder, lambda description: description["config"].update(num_heads=4))
    victims.refuse(folder, match="num_heads")
    (folder / CONFIG).write_text(original)
    edit_json(folder, lambda description: description["config"].update(cache_size=3, instruction_policy="all_turns"))
    assert load_adapter(tiny.llava(), folder).config.instruction_policy == "all_turns"


def test_a_processor_that_was_forgotten_is_missed(tmp_path):
    model = base_model()
    patch_model(model, ATTENTION, processor=tiny.processor()).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="processor=processor"):
        load_adapter(base_model(), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(base_model(), tmp_path, processor=tiny.processor())


def test_newer_format(folder, victims):
    def change(description):
        description.update(format_version=2, library_version="9.1")
        description["config"]["invented_later"] = 1

    edit_json(folder, change)
    victims.refuse(folder, match=r"(?s)format_version 2.*9\.1.*upgrade")


def test_newer_format_that_keeps_its_tensors_elsewhere(folder, victims):
    edit_json(folder, lambda description: description.update(format_version=2))
    (folder / WEIGHTS).rename(folder / "adapter.bin")
    victims.refuse(folder, match="upgrade")


def test_newer_save_interrupted_over_an_older(folder, victims):
    """The tensor file is the newer one then, and only its metadata says so."""
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        description = json.loads(file.metadata()["emma_adapter"])
    description.update(format_version=2, sha256="another")
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    safetensors.torch.save_file(tensors, folder / WEIGHTS, metadata={"emma_adapter": json.dumps(description)})
    victims.refuse(folder, match="upgrade")


def test_adapter_of_peft(folder, victims):
    description = {"peft_type": "LORA", "r": 8, "target_modules": ["q_proj"], "base_model_name_or_path": "x"}
    (folder / CONFIG).write_text(json.dumps(description))
    victims.refuse(folder, match=r"an adapter of PEFT \(LORA\)")


# ---------------------------------------------------------------------------------------------- other models


def other_model(kind):
    vision, text = tiny.vision_config(), tiny.llama_config(VOCABULARY)
    if kind == "visual channels":
        vision.hidden_size = 48
        return base_model(vision_config=vision)
    if kind == "visual tokens":
        vision.image_size = 3 * tiny.PATCH
        return base_model(vision_config=vision, image_seq_length=9)
    if kind == "class token":
        return base_model(vision_feature_select_strategy="full", image_seq_length=5)
    if kind == "feature layers":
        return base_model(vision_feature_layer=[-2, -1])
    text.hidden_size = 64
    return base_model(text_config=text)


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("visual channels", "48"),
        ("visual tokens", "9"),
        ("class token", "5"),
        ("feature layers", "64"),
        ("language model", "64"),
    ],
)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_adapter_of_another_model(kind, match, fusion, tmp_path):
    saved(tmp_path, FUSIONS[fusion])
    model = other_model(kind)
    values = copied(model)
    with pytest.raises(CheckpointError, match=match) as caught:
        load_adapter(model, tmp_path)
    assert isinstance(caught.value, ValueError)
    assert is_untouched(model)
    assert same_values(model.state_dict(), values)


@pytest.mark.parametrize("kind", ["visual channels", "visual tokens", "class token", "feature layers"])
def test_adapter_of_another_model_into_a_patched_one(kind, intact):
    model = other_model(kind)
    patch_model(model, ATTENTION)
    values = copied(model)
    with pytest.raises(CheckpointError):
        load_adapter(model, intact)
    assert same_values(model.state_dict(), values)


@pytest.mark.parametrize("projector", [False, True])
def test_adapter_of_another_language_model_into_a_patched_one(projector, tmp_path):
    saved(tmp_path, projector=projector)
    model = other_model("language model")
    patch_model(model, ATTENTION)
    values = copied(model)
    with pytest.raises((CheckpointError, PatchError), match=r"64|another kind"):
        load_adapter(model, tmp_path)
    assert same_values(model.state_dict(), values)


def test_linear_adapter_into_a_model_of_varying_size(tmp_path):
    """Its weights are resampled from the grid they were trained on."""
    saved(tmp_path, FUSIONS["linear"])
    adapter = load_adapter(tiny.pixtral_llava(), tmp_path)
    assert adapter.config.visual_grid == (tiny.GRID, tiny.GRID)


# ---------------------------------------------------------------------------------------------- sources


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_missing_file(name, folder, victims):
    (folder / name).unlink()
    victims.refuse(folder, match=name)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_folder_where_a_file_should_be(name, folder, victims):
    (folder / name).unlink()
    (folder / name).mkdir()
    victims.refuse(folder, match=name)


def test_card_is_not_needed(folder, reference):
    (folder / CARD).unlink()
    model = base_model()
    load_adapter(model, folder)
    assert torch.equal(logits(model), reference[1])


@pytest.mark.parametrize("source", ["nobody/emma-adapter-that-is-not-there", "/no/such/folder", "no such id", "a/b/c"])
def test_neither_folder_nor_hub_id(source, victims):
    victims.refuse(source, match="neither a folder")


def test_file_as_source(folder, victims):
    victims.refuse(folder / WEIGHTS, match="neither a folder")


def test_empty_folder(tmp_path, victims):
    victims.refuse(tmp_path, match=CONFIG)


def test_hub_id(intact, monkeypatch, reference):
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(intact)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model = base_model()
    load_adapter(model, "somebody/adapter", revision="v2", local_files_only=True)
    assert torch.equal(logits(model), reference[1])
    assert asked["name"] == "somebody/adapter"
    assert asked["revision"] == "v2"
    assert asked["local_files_only"] is True
    assert {CONFIG, WEIGHTS} <= set(asked["allow_patterns"])


# ---------------------------------------------------------------------------------------------- own encoder


class BagOfLetters(nn.Module):
    """An instruction encoder of the user's own."""

    def __init__(self, instruction_dim=12):
        super().__init__()
        self.instruction_dim = instruction_dim
        self.max_instruction_tokens = 6

    def forward(self, texts):
        codes = torch.tensor([[ord(letter) for letter in text[:6].ljust(6)] for text in texts])
        tokens = torch.sin(codes[..., None] * torch.arange(1, self.instruction_dim + 1) / 7)
        return tokens, torch.ones_like(codes, dtype=torch.bool)


@pytest.fixture
def own_encoder_save(tmp_path):
    model = base_model()
    adapter = patch_model(model, ATTENTION, processor=tiny.processor(), instruction_encoder=BagOfLetters())
    tiny.train_randomly(adapter.alignment)
    adapter.save_pretrained(tmp_path)
    return model, tmp_path


CHAT = tiny.chat_inputs([[tiny.user("how many dogs?")], [tiny.user("what colour?")]])


def test_own_encoder_must_be_passed_again(own_encoder_save):
    _, folder = own_encoder_save
    model = base_model()
    values = copied(model)
    with pytest.raises(EncoderError, match=r"(?s)BagOfLetters.*instruction_encoder="):
        load_adapter(model, folder, processor=tiny.processor())
    assert is_untouched(model)
    assert same_values(model.state_dict(), values)


def test_own_encoder_passed_again(own_encoder_save):
    model, folder = own_encoder_save
    other = base_model()
    load_adapter(other, folder, processor=tiny.processor(), instruction_encoder=BagOfLetters())
    assert torch.equal(logits(other, CHAT), logits(model, CHAT))
    assert not torch.equal(logits(other, CHAT), logits(base_model(), CHAT))
    assert "custom:" in (folder / CARD).read_text()
    assert not any("encoder" in name for name in safetensors.torch.load_file(folder / WEIGHTS))


def test_own_encoder_of_another_width(own_encoder_save):
    _, folder = own_encoder_save
    model = base_model()
    with pytest.raises(EmmaError, match="instruction_dim"):
        load_adapter(model, folder, processor=tiny.processor(), instruction_encoder=BagOfLetters(16))
    assert is_untouched(model)


def test_own_encoder_in_a_patched_model_is_used_again(own_encoder_save):
    model, folder = own_encoder_save
    other = base_model()
    patch_model(other, ATTENTION, processor=tiny.processor(), instruction_encoder=BagOfLetters())
    load_adapter(other, folder)
    assert torch.equal(logits(other, CHAT), logits(model, CHAT))


@pytest.mark.parametrize("fusion", FUSIONS)
def test_text_tower_round_trips_and_may_move(fusion, clip_folder, tmp_path):
    config = FUSIONS[fusion].replace(max_instruction_tokens=None)
    model = base_model()
    adapter = patch_model(model, config, processor=tiny.processor(), instruction_encoder=str(clip_folder))
    tiny.train_randomly(adapter.alignment)
    adapter.save_pretrained(tmp_path / "adapter")
    moved = shutil.copytree(clip_folder, tmp_path / "moved")
    for encoder in (None, str(moved)):
        other = base_model()
        load_adapter(other, tmp_path / "adapter", processor=tiny.processor(), instruction_encoder=encoder)
        assert torch.equal(logits(other, CHAT), logits(model, CHAT))
    edit_json(tmp_path / "adapter", lambda d: d["config"].update(instruction_encoder=str(tmp_path / "gone")))
    other = base_model()
    for encoder in (None, str(tmp_path / "gone")):
        with pytest.raises(EncoderError, match="gone"):
            load_adapter(other, tmp_path / "adapter", processor=tiny.processor(), instruction_encoder=encoder)
    assert is_untouched(other)


def test_second_load_with_a_text_tower_that_moved(clip_folder, tmp_path):
    """A model into which adapters are loaded one after the other, all saved where the tower was elsewhere."""
    models = []
    for seed in (1, 2):
        model = base_model()
        adapter = patch_model(model, ATTENTION, processor=tiny.processor(), instruction_encoder=str(clip_folder))
        tiny.train_randomly(adapter.alignment, seed=seed)
        adapter.save_pretrained(tmp_path / str(seed))
        models.append(model)
    moved = str(shutil.copytree(clip_folder, tmp_path / "moved"))
    other = base_model()
    for seed, model in enumerate(models, 1):
        load_adapter(other, tmp_path / str(seed), processor=tiny.processor(), instruction_encoder=moved)
        assert torch.equal(logits(other, CHAT), logits(model, CHAT))
