"""The instruction encoder that an adapter's config names: what may be loaded because a file says so, and that nothing
which is loaded runs code of its own."""

from __future__ import annotations

import json
import os
import shutil

import open_clip
import pytest
import torch
import transformers
from transformers import CLIPTextModel

from emma_adapter import EmmaConfig, EncoderError, get_adapter, load_adapter, patch_model
from emma_adapter.instructions import encoders, text_towers
from emma_adapter.instructions.encoders import names_a_path
from emma_adapter.instructions.text_towers import OpenClipTextTower, TransformersTextTower
from tests.fuzz.mutations import Folder
from tests.fuzz.test_hostile_checkpoints import PAYLOADS
from tests.fuzz.victims import FUSIONS, fingerprint, logits, patched
from tests.instructions.test_encoders import open_clip_folder, siglip_tokenizer
from tests.support import tiny

PATHS = [
    "/",
    "/etc",
    "/dev/zero",
    "..",
    ".",
    "./clip",
    "../clip",
    "~",
    "~/clip",
    "a/b/c",
    "C:\\clip",
    "\\\\host\\share",
]
PATHS += ["file:///etc", "clip/", "/clip", "x--y", "a/..", " ", "clip\0", "\ud800", "http://host/x", "a" * 200]
PATHS += ["open_clip:local-dir:/etc", "open_clip:local-dir:clip", "open_clip:ViT-B-32:/dev/zero"]
PATHS += ["open_clip:ViT-B-32:weights.pt", "open_clip:hf-hub:../clip", "open_clip:hf-hub:/etc", "open_clip:../x:y"]
NAMES = [
    "openai/clip-vit-large-patch14-336",
    "bert",
    "org/name",
    "Org-1/na.me_2",
    "custom:module.Class",
    "open_clip:ViT-B-32",
]
NAMES += ["open_clip:ViT-B-32:openai", "open_clip:ViT-B-32:laion2b_s34b_b79k", "open_clip:ViT-B/32:openai"]
NAMES += ["open_clip:hf-hub:timm/ViT-B-16-SigLIP", "open_clip:no-such-model"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """So that names are relative to a folder of this test."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def folder(tmp_path):
    model = patched()
    get_adapter(model).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def downloaded(folder, monkeypatch):
    """The hub id of an adapter whose download is ``folder``."""
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(folder))
    return "somebody/adapter"


def name_encoder(folder, spec):
    """Have both files of an adapter name this encoder."""
    made = Folder.read(folder)
    made.description["config"]["instruction_encoder"] = spec
    for name, content in made.content().items():
        (folder / name).write_bytes(content)


# ---------------------------------------------------------------------------------------------- paths


def test_paths_that_a_downloaded_adapter_names_are_not_even_looked_at(folder, downloaded, monkeypatch):
    def looked(*_, **__):
        raise AssertionError("it was looked at")

    model, trained = tiny.llava(), patched(FUSIONS["modulation"])
    before = [fingerprint(victim) for victim in (model, trained)]
    monkeypatch.setattr(encoders, "build_encoder", looked)
    for spec in PATHS:
        assert names_a_path(spec), ascii(spec)
        if not spec.strip():
            continue
        name_encoder(folder, spec)
        for victim, name in ((model, None), (trained, "another")):
            with pytest.raises(EncoderError, match=r"instruction_encoder=") as caught:
                load_adapter(victim, downloaded, name=name, processor=tiny.processor())
            assert str(caught.value).isprintable()
        assert [fingerprint(victim) for victim in (model, trained)] == before, ascii(spec)


@pytest.mark.parametrize("spec", NAMES)
def test_names_are_followed(spec):
    assert not names_a_path(spec)


def test_a_name_that_is_a_folder_here_is_a_path(tmp_path):
    """transformers would take the folder, which may be anybody's."""
    assert not names_a_path("org/name")
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert names_a_path("org/name")
    assert names_a_path("open_clip:hf-hub:org/name")


def test_a_path_is_followed_if_the_caller_names_it_or_has_the_adapter_here(clip_folder, folder, downloaded):
    model = tiny.llava()
    adapter = patch_model(model, FUSIONS["attention"], processor=tiny.processor(), instruction_encoder=str(clip_folder))
    tiny.train_randomly(adapter.alignment)
    adapter.save_pretrained(folder)
    chat = tiny.chat_inputs([[tiny.user("how many dogs?")]])
    with torch.no_grad():
        expected = model(**chat).logits
    other = tiny.llava()
    with pytest.raises(EncoderError, match=r"say where the text tower is"):
        load_adapter(other, downloaded, processor=tiny.processor())
    load_adapter(other, downloaded, processor=tiny.processor(), instruction_encoder=str(clip_folder))
    local = tiny.llava()
    load_adapter(local, folder, processor=tiny.processor())
    with torch.no_grad():
        assert torch.equal(other(**chat).logits, expected)
        assert torch.equal(local(**chat).logits, expected)
    # The encoder is there now: nothing is looked for.
    load_adapter(model, folder)
    assert f'instruction_encoder="{clip_folder}")' in (folder / "README.md").read_text()


# ---------------------------------------------------------------------------------------------- code


def add_tokenizer_code(folder, canary):
    """A tokenizer of its own code, as the hub has them for trust_remote_code=True."""
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(canary)!r})\nclass Evil: pass\n")
    about = folder / "tokenizer_config.json"
    facts = json.loads(about.read_text()) | {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    about.write_text(json.dumps({**facts, "tokenizer_class": "Evil"}))


def never_asked(*_):
    raise AssertionError("the user was asked whether to run code")


def test_a_text_tower_with_code(clip_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", never_asked)
    tower, canary = shutil.copytree(clip_folder, tmp_path / "tower"), tmp_path / "canary"
    add_tokenizer_code(tower, canary)
    config = json.loads((tower / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}
    (tower / "config.json").write_text(json.dumps(config))
    with pytest.raises(EncoderError, match="trust_remote_code"):
        TransformersTextTower(str(tower), -2)
    assert not canary.exists()


def test_the_code_would_run(clip_folder, tmp_path):
    """Else the test above, and the next, could not fail."""
    tower, canary = shutil.copytree(clip_folder, tmp_path / "tower"), tmp_path / "canary"
    add_tokenizer_code(tower, canary)
    with pytest.raises((AttributeError, TypeError, ValueError)):
        transformers.AutoTokenizer.from_pretrained(tower, trust_remote_code=True)
    assert canary.exists()


@pytest.mark.parametrize("asked", [{"trust_remote_code": True}, {}], ids=["config asks", "config says nothing"])
def test_an_open_clip_model_with_code(asked, tmp_path, monkeypatch):
    """open_clip passes on to transformers what a model's config says."""
    monkeypatch.setattr("builtins.input", never_asked)
    canary = tmp_path / "canary"
    tower = tmp_path / "tower"
    tower.mkdir()
    source = open_clip_folder(tower, siglip_tokenizer(), tokenizer_kwargs={"clean": "canonicalize", **asked})
    OpenClipTextTower(source, -2)
    add_tokenizer_code(tower, canary)
    with pytest.raises(EncoderError, match="trust_remote_code"):
        OpenClipTextTower(source, -2)
    assert not canary.exists()


def test_an_open_clip_model_whose_text_tower_is_another_models(tmp_path, monkeypatch):
    """It would be loaded through AutoModel, code and all."""
    monkeypatch.setattr(open_clip, "create_model", never_asked)
    tower = tmp_path / "tower"
    tower.mkdir()
    (tower / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": {"embed_dim": 8, "vision_cfg": {}, "text_cfg": {"hf_model_name": "evil/model"}}})
    )
    with pytest.raises(EncoderError, match="HFTextEncoder"):
        OpenClipTextTower(f"local-dir:{tower}", -2)


@pytest.mark.parametrize("forced", [False, True], ids=["default", "forced-unsafe"])
@pytest.mark.parametrize("payload", ["os.mkdir", "__setstate__"])
def test_pickled_weights_of_a_text_tower(payload, forced, clip_folder, tmp_path, monkeypatch):
    """Weights in a .bin are still common, the paper's text tower is one: read, but without what isn't a tensor."""
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    tower, canary = shutil.copytree(clip_folder, tmp_path / "tower"), tmp_path / "canary"
    weights = CLIPTextModel.from_pretrained(clip_folder).state_dict()
    (tower / "model.safetensors").unlink()
    torch.save(weights, tower / "pytorch_model.bin")
    TransformersTextTower(str(tower), -2)
    torch.save({**weights, "more": PAYLOADS[payload](canary)}, tower / "pytorch_model.bin")
    with pytest.raises(EncoderError):
        TransformersTextTower(str(tower), -2)
    path = tmp_path / "weights.pt"
    torch.save({"more": PAYLOADS[payload](canary)}, path)
    with pytest.raises(EncoderError):
        OpenClipTextTower(f"ViT-S-32-alt:{path}", -2)
    assert not canary.exists()


def test_a_text_tower_is_told_to_have_no_code_and_no_pickled_objects(clip_folder, monkeypatch):
    """Whatever their defaults become."""
    seen = {}

    def noted(name, original):
        def call(*args, **options):
            seen[name] = options
            return original(*args, **options)

        return call

    for name, holder in (("tokenizer", transformers.AutoTokenizer), ("weights", CLIPTextModel)):
        monkeypatch.setattr(holder, "from_pretrained", noted(name, holder.from_pretrained))
    TransformersTextTower(str(clip_folder), -2)
    assert seen["tokenizer"]["trust_remote_code"] is False
    assert seen["weights"]["weights_only"] is True


# ---------------------------------------------------------------------------------------------- the hub


def test_a_name_on_the_hub_is_asked_for_there_and_nowhere_else(folder, monkeypatch):
    name_encoder(folder, "somebody/tower")
    asked = []

    def load(source, options):
        asked.append(source)
        raise EncoderError("not here")

    monkeypatch.setattr(text_towers, "_load_from_transformers", load)
    model = tiny.llava()
    before = fingerprint(model)
    with pytest.raises(EncoderError, match="not here"):
        load_adapter(model, folder, processor=tiny.processor())
    assert asked == ["somebody/tower"]
    assert fingerprint(model) == before


def test_nothing_is_opened_outside_of_the_folder(folder, monkeypatch):
    """Of an adapter that needs no encoder, by what Python itself tells of the files it opens."""
    import sys

    model = tiny.llava()
    load_adapter(tiny.llava(), folder)  # imports what it needs
    opened = []
    watching = True

    def hook(event, arguments):
        if watching and event == "open" and not isinstance(arguments[0], int):  # not what is open already
            opened.append(str(arguments[0]))

    sys.addaudithook(hook)
    load_adapter(model, folder)
    watching = False
    logits(model)
    assert {os.path.realpath(path) for path in opened} == {
        str(folder / name) for name in ("adapter_config.json", "adapter_model.safetensors")
    }


def test_paper_config_is_loaded_by_name(monkeypatch):
    assert not names_a_path(EmmaConfig.paper().instruction_encoder)
