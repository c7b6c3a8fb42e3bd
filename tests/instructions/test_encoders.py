from __future__ import annotations

import copy
import functools
import json

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextModel,
    GemmaTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Siglip2Config,
    Siglip2Model,
    Siglip2TextModel,
    Siglip2Tokenizer,
    SiglipConfig,
    SiglipModel,
    SiglipTextModel,
    SiglipTokenizer,
)

from emma_adapter import EmmaConfig, EncoderError, InstructionEncoder, load_adapter, patch_model
from emma_adapter.instructions.encoders import CachedEncoder
from emma_adapter.instructions.text_towers import OpenClipTextTower, TransformersTextTower
from tests.support import tiny

TEXTS = ["is there a cat?", "how many dogs are there, and what colour is the left one?", ""]
LONG = " ".join(TEXTS * 9)
CPU = torch.device("cpu")
CONTEXT = 16


@pytest.fixture(scope="session")
def open_clip_weights(tmp_path_factory):
    """A small open_clip model that people really use, with random weights in a local file."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("open-clip") / "weights.pt"
    torch.save(open_clip.create_model("ViT-S-32-alt").state_dict(), path)
    return f"open_clip:ViT-S-32-alt:{path}"


def siglip_tokenizer():
    """As SigLIP's: a unigram model whose end token, id 1, pads too. Unlike SigLIP's own, it keeps case."""
    words = ["▁", *"abcdefghiklmnorstuwy?,", *(f"▁{word}" for word in ("is", "there", "cat", "CAT", "IS", "dog"))]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((word, -1.0) for word in words)]
    made = Tokenizer(models.Unigram(pieces, unk_id=2))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="</s>", pad_token="</s>")


def gemma_tokenizer(tokenizer_class, **options):
    """As SigLIP2's: Gemma's byte-pair encoding, padded with id 0 and ended with id 1."""
    merges = [("a", "t"), ("h", "e"), ("▁", "t"), ("▁t", "he"), ("▁the", "r"), ("c", "at"), ("I", "S")]
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *"abcdefghiklmnorstuwyCIS?,"]
    vocab = {piece: i for i, piece in enumerate([*pieces, *map("".join, merges)])}
    return tokenizer_class(vocab=vocab, merges=merges, add_bos_token=False, add_eos_token=True, **options)


def fixed_resolution_siglip2_tokenizer():
    made = gemma_tokenizer(GemmaTokenizer)
    # Part of the published tokenizer.json.
    made.backend_tokenizer.enable_padding(length=CONTEXT, pad_id=0, pad_token="<pad>")
    made.backend_tokenizer.enable_truncation(CONTEXT)
    return made


#: Name -> configuration and model class of a checkpoint with both towers, and its tokenizer.
CHECKPOINTS = {
    "siglip": (SiglipConfig, SiglipModel, siglip_tokenizer),
    "siglip2, fixed resolution": (SiglipConfig, SiglipModel, fixed_resolution_siglip2_tokenizer),
    "siglip2": (Siglip2Config, Siglip2Model, functools.partial(gemma_tokenizer, Siglip2Tokenizer)),
}


def whole_model(config_class, model_class):
    torch.manual_seed(7)
    sizes = {"hidden_size": 24, "intermediate_size": 48, "num_attention_heads": 4}
    text = {"vocab_size": 100, "max_position_embeddings": CONTEXT, "bos_token_id": 2, "eos_token_id": 1}
    config = config_class(
        text_config={**sizes, **text, "num_hidden_layers": 3, "pad_token_id": 1},
        vision_config={**sizes, "num_hidden_layers": 1, "patch_size": 14},
    )
    return model_class(config).eval()


@pytest.fixture(scope="session")
def siglip_folders(tmp_path_factory):
    folders = {}
    for name, (config_class, model_class, make_tokenizer) in CHECKPOINTS.items():
        folders[name] = tmp_path_factory.mktemp("siglip")
        whole_model(config_class, model_class).save_pretrained(folders[name])
        make_tokenizer().save_pretrained(folders[name])
    return folders


@pytest.fixture(params=CHECKPOINTS)
def siglip_folder(request, siglip_folders):
    return siglip_folders[request.param]


def text_model(folder):
    """The text model of the whole checkpoint, its weights checked against the file by name."""
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    model = (Siglip2Model if model_type == "siglip2" else SiglipModel).from_pretrained(folder).text_model.eval()
    weights = load_file(folder / "model.safetensors")
    assert all(torch.equal(value, weights[f"text_model.{key}"]) for key, value in model.state_dict().items())
    return model


@pytest.mark.parametrize("layer", [-1, -2, 0, 3])
def test_transformers_tower_gives_the_hidden_state(clip_folder, layer):
    tower = TransformersTextTower(str(clip_folder), layer).eval()
    tokens, mask = tower(TEXTS)
    model, tokenizer = CLIPTextModel.from_pretrained(clip_folder).eval(), AutoTokenizer.from_pretrained(clip_folder)
    for row, text in enumerate(TEXTS):
        ids = tokenizer(text, truncation=True, max_length=16, return_tensors="pt")["input_ids"]
        length = ids.shape[1]
        with torch.no_grad():
            expected = model(input_ids=ids, output_hidden_states=True).hidden_states[layer][0]
        torch.testing.assert_close(tokens[row, :length], expected, atol=1e-5, rtol=0)
        assert mask[row].tolist() == [i < length for i in range(16)]


def test_transformers_tower_pads_with_zeros_as_the_authors_do(clip_folder):
    tower = TransformersTextTower(str(clip_folder), -2).eval()
    tokens, _ = tower(TEXTS[:1])
    ids = tower.tokenizer(TEXTS[0])["input_ids"]
    padded = torch.tensor([ids + [0] * (16 - len(ids))])
    with torch.no_grad():
        expected = tower.tower(input_ids=padded, output_hidden_states=True).hidden_states[-2]
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize("layer", [-1, -2, 0])
def test_siglip_tower_gives_the_hidden_state_of_the_whole_model(siglip_folder, layer):
    tower = TransformersTextTower(str(siglip_folder), layer)
    tokens, mask = tower(TEXTS)
    model, tokenizer = text_model(siglip_folder), AutoTokenizer.from_pretrained(siglip_folder)
    padding = {"padding": "max_length", "max_length": CONTEXT, "padding_side": "right"}
    ids = tokenizer(TEXTS, truncation=True, **padding, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = model(input_ids=ids, output_hidden_states=True).hidden_states[layer]
    torch.testing.assert_close(tokens, expected, atol=1e-6, rtol=0)
    lengths = [min(CONTEXT, len(tokenizer(text)["input_ids"])) for text in TEXTS]
    assert mask.tolist() == [[i < length for i in range(CONTEXT)] for length in lengths]
    assert lengths[0] < CONTEXT
    assert tower.encodes_padding
    assert (tower.instruction_dim, tower.max_instruction_tokens) == (24, CONTEXT)


def test_siglip_tower_reads_the_padding(siglip_folder):
    # What the test above would not see if padding didn't matter.
    tokens, mask = TransformersTextTower(str(siglip_folder), -2)(TEXTS[:1])
    ids = AutoTokenizer.from_pretrained(siglip_folder)(TEXTS[0], truncation=True, max_length=CONTEXT)["input_ids"]
    with torch.no_grad():
        unpadded = text_model(siglip_folder)(torch.tensor([ids]), output_hidden_states=True).hidden_states[-2]
    assert (tokens[mask] - unpadded[0]).abs().max() > 1e-2


def test_siglip_encodings_do_not_depend_on_the_batch(siglip_folder):
    tower = TransformersTextTower(str(siglip_folder), -2)
    tokens, mask = tower([*TEXTS, LONG])
    for row, text in enumerate([*TEXTS, LONG]):
        alone, alone_mask = tower([text])
        torch.testing.assert_close(tokens[row], alone[0], atol=1e-6, rtol=0)
        assert torch.equal(mask[row], alone_mask[0])


def test_siglip_lower_cases(siglip_folder, clip_folder):
    tower = TransformersTextTower(str(siglip_folder), -2)
    assert torch.equal(tower(["IS there a Cat?"])[0], tower(["is there a cat?"])[0])
    assert not torch.equal(tower(["is there a dog?"])[0], tower(["is there a cat?"])[0])
    clip = TransformersTextTower(str(clip_folder), -2)
    assert not torch.equal(clip(["IS there a Cat?"])[0], clip(["is there a cat?"])[0])


def test_long_texts_are_cut_before_the_end_token(siglip_folder):
    tower = TransformersTextTower(str(siglip_folder), 0)
    tokens, mask = tower([LONG])
    assert mask.all()
    ids = AutoTokenizer.from_pretrained(siglip_folder)(LONG)["input_ids"]
    assert len(ids) > CONTEXT
    with torch.no_grad():
        expected = tower.tower.embeddings(torch.tensor([[*ids[: CONTEXT - 1], 1]]))
    assert torch.equal(tokens, expected)


def save_text_tower_alone(folder, text_model, tokenizer_folder):
    text_model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "text_class"),
    [("siglip", SiglipTextModel), ("siglip2, fixed resolution", SiglipTextModel), ("siglip2", Siglip2TextModel)],
)
def test_siglip_text_tower_alone_in_a_folder(siglip_folders, tmp_path, name, text_class):
    whole = siglip_folders[name]
    save_text_tower_alone(tmp_path, text_class.from_pretrained(whole), whole)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"].endswith("_text_model")
    for part, expected in zip(
        TransformersTextTower(str(tmp_path), -2)(TEXTS), TransformersTextTower(str(whole), -2)(TEXTS), strict=True
    ):
        assert torch.equal(part, expected)


def test_clip_text_tower_of_a_whole_checkpoint(clip_folder, tmp_path):
    alone = CLIPTextModel.from_pretrained(clip_folder)
    sizes = {"hidden_size": 24, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 1}
    whole = CLIPModel(CLIPConfig(text_config=alone.config.to_dict(), vision_config={**sizes, "image_size": 32}))
    whole.text_model.load_state_dict(alone.state_dict())
    save_text_tower_alone(tmp_path, whole, clip_folder)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "clip"
    tokens, mask = TransformersTextTower(str(tmp_path), -2)(TEXTS)
    expected, expected_mask = TransformersTextTower(str(clip_folder), -2)(TEXTS)
    assert torch.equal(tokens, expected)
    assert torch.equal(mask, expected_mask)


@pytest.mark.parametrize("lost", ["text_model.", "text_model.encoder.layers.1.mlp.fc1.bias"])
def test_missing_text_weights_are_an_error(tmp_path, lost):
    whole_model(SiglipConfig, SiglipModel).save_pretrained(tmp_path)
    siglip_tokenizer().save_pretrained(tmp_path)
    TransformersTextTower(str(tmp_path), -2)
    path = tmp_path / "model.safetensors"
    kept = {key: value for key, value in load_file(path).items() if not key.startswith(lost)}
    save_file(kept, path, metadata={"format": "pt"})
    with pytest.raises(EncoderError, match=r"weights of its text tower: .*(final_layer_norm|fc1|embeddings)"):
        TransformersTextTower(str(tmp_path), -2)


@pytest.mark.parametrize("model_type", ["siglip_vision_model", "bert", "not_in_transformers", None])
def test_checkpoints_of_other_families_are_refused(siglip_folders, tmp_path, model_type):
    config = json.loads((siglip_folders["siglip"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
    with pytest.raises(EncoderError, match=rf"{model_type}.*clip_text_model, siglip, .*siglip2_text_model"):
        TransformersTextTower(str(tmp_path), -2)


def test_siglip_needs_a_padding_token(tmp_path):
    whole_model(SiglipConfig, SiglipModel).save_pretrained(tmp_path)
    tokenizer = siglip_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(EncoderError, match="padding token"):
        TransformersTextTower(str(tmp_path), -2)


def test_siglip_with_its_own_tokenizer(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text for text in TEXTS if text] * 4),
        model_prefix=str(tmp_path / "spiece"),
        vocab_size=60,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
    )
    own = SiglipTokenizer(str(tmp_path / "spiece.model"))
    own.save_pretrained(tmp_path)
    whole_model(SiglipConfig, SiglipModel).save_pretrained(tmp_path)
    tower = TransformersTextTower(str(tmp_path), -2)
    assert isinstance(tower.tokenizer, SiglipTokenizer)
    texts = [*TEXTS, "IS there a Cat", LONG]
    tokens, mask = tower(texts)
    ids = own(texts, padding="max_length", max_length=CONTEXT, truncation=True, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = text_model(tmp_path)(input_ids=ids, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(tokens, expected, atol=1e-6, rtol=0)
    assert mask.sum(1).tolist() == [min(CONTEXT, len(own(text)["input_ids"])) for text in texts]
    assert torch.equal(tokens[3], tokens[0])  # without case and punctuation


def test_siglip_in_a_model(siglip_folder):
    model = tiny.llava()
    adapter = patch_model(model, EmmaConfig.paper(str(siglip_folder)), processor=tiny.processor())
    assert adapter.config.max_instruction_tokens == CONTEXT
    seen = []
    adapter.alignment.fusion.register_forward_pre_hook(lambda module, args: seen.append(args))
    inputs = tiny.chat_inputs([[tiny.user("is there a cat?")], [tiny.user("why?")], [tiny.user("is there a cat?")]])
    for _ in range(2):
        model(**inputs)
    assert adapter.cache_info()[:2] == (4, 2)
    (_, first, mask, _), (_, again, _, _) = seen
    assert mask is None
    assert first.shape[1] == CONTEXT
    assert torch.equal(first, again)
    assert torch.equal(first[0], first[2])
    assert not torch.equal(first[0], first[1])
    encoder = model._emma.pipeline.encoder.module
    assert not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_open_clip_tower_gives_the_output_of_the_block(open_clip_weights):
    tower = OpenClipTextTower(open_clip_weights.removeprefix("open_clip:"), -2).eval()
    tokens, mask = tower(TEXTS)
    clip = open_clip.create_model("ViT-S-32-alt", pretrained=open_clip_weights.rpartition(":")[2]).eval()
    ids = open_clip.get_tokenizer("ViT-S-32-alt")(TEXTS)
    seen = []
    clip.transformer.resblocks[-2].register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        clip.encode_text(ids)
    expected = seen[0] if seen[0].shape[0] == len(TEXTS) else seen[0].transpose(0, 1)
    torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=1e-5)
    end = open_clip.tokenizer.SimpleTokenizer().eot_token_id
    assert mask.sum(1).tolist() == [row.index(end) + 1 for row in ids.tolist()]
    assert tokens.shape == (3, tower.max_instruction_tokens, tower.instruction_dim)


def test_open_clip_tower_in_a_model(open_clip_weights):
    model = tiny.llava()
    adapter = patch_model(model, processor=tiny.processor(), instruction_encoder=open_clip_weights)
    inputs = tiny.chat_inputs([[tiny.user("is there a cat?")], [tiny.user("why?")]])
    with torch.no_grad():
        before = model(**inputs).logits
        tiny.train_randomly(adapter.alignment)
        assert not torch.equal(model(**inputs).logits, before)
    assert adapter.cache_info()[:2] == (2, 2)


def open_clip_folder(folder, tokenizer, **text_changes):
    """A model with SigLIP's kind of text tower as open_clip reads it from a local folder."""
    text = {
        "context_length": CONTEXT,
        "vocab_size": 100,
        "width": 16,
        "heads": 2,
        "layers": 3,
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
        "hf_tokenizer_name": "on/the-hub",
        "tokenizer_kwargs": {"clean": "canonicalize"},
    }
    config = {
        "embed_dim": 8,
        "custom_text": True,
        "init_logit_bias": -10,
        "vision_cfg": {"image_size": 16, "patch_size": 16, "width": 16, "head_width": 8, "layers": 1},
        "text_cfg": {**text, **text_changes},
    }
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(9)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


def open_clip_says(source, texts, block, monkeypatch):
    """Ids and the output of a block, by open_clip's own means."""
    # Older versions of open_clip call a method that transformers 5 dropped.
    monkeypatch.setattr(PreTrainedTokenizerBase, "batch_encode_plus", PreTrainedTokenizerFast.__call__, raising=False)
    ids = open_clip.get_tokenizer(source)(texts)
    clip = open_clip.create_model(source).eval()
    seen = []
    clip.text.transformer.resblocks[block].register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        clip.encode_text(ids)
    monkeypatch.undo()
    return ids, seen[0] if seen[0].shape[0] == len(texts) else seen[0].transpose(0, 1)


def open_clip_tokenizer(name):
    if name == "siglip":
        return siglip_tokenizer()
    return gemma_tokenizer(GemmaTokenizer, padding_side=name.removeprefix("siglip2, "))


@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize("name", ["siglip", "siglip2, right", "siglip2, left"])
def test_open_clip_siglip_tower(tmp_path, monkeypatch, name, layer):
    source = open_clip_folder(tmp_path, open_clip_tokenizer(name))
    tower = OpenClipTextTower(source, layer).eval()
    texts = [*TEXTS, "IS, there... a CAT!", LONG]
    tokens, mask = tower(texts)
    ids, expected = open_clip_says(source, texts, layer, monkeypatch)
    torch.testing.assert_close(tokens, expected, atol=1e-6, rtol=0)
    assert torch.equal(tokens[3], tokens[0])  # open_clip drops case and punctuation
    # Up to the first end token; id 0 pads before it only if that is the left.
    end = [row.index(1) for row in ids.tolist()]
    assert mask.tolist() == [
        [row[i] != 0 and i <= last for i in range(CONTEXT)] for row, last in zip(ids.tolist(), end, strict=True)
    ]
    assert mask[0].sum() < mask[4].sum() == CONTEXT
    for row, text in enumerate(texts):
        torch.testing.assert_close(tower([text])[0][0], tokens[row], atol=1e-6, rtol=0)
    assert (tower.instruction_dim, tower.max_instruction_tokens) == (16, CONTEXT)


def test_open_clip_tower_that_strips_its_end_token(tmp_path, monkeypatch):
    tokenizer = gemma_tokenizer(GemmaTokenizer, padding_side="right", sep_token="<eos>")
    source = open_clip_folder(tmp_path, tokenizer, tokenizer_kwargs={"strip_sep_token": True})
    tokens, mask = OpenClipTextTower(source, -2).eval()(TEXTS)
    ids, expected = open_clip_says(source, TEXTS, -2, monkeypatch)
    assert not (ids == 1).any()
    torch.testing.assert_close(tokens, expected, atol=1e-6, rtol=0)
    assert mask.sum(1).tolist() == [min(CONTEXT, len(tokenizer(text)["input_ids"])) for text in TEXTS]


def test_open_clip_siglip_in_a_model(tmp_path):
    source = f"open_clip:{open_clip_folder(tmp_path, siglip_tokenizer())}"
    model = tiny.llava()
    adapter = patch_model(model, EmmaConfig.paper(source), processor=tiny.processor())
    inputs = tiny.chat_inputs([[tiny.user("is there a cat?")], [tiny.user("why?")]])
    with torch.no_grad():
        before = model(**inputs).logits
        tiny.train_randomly(adapter.alignment)
        assert not torch.equal(model(**inputs).logits, before)
    assert adapter.cache_info()[:2] == (2, 2)
    assert adapter.config.max_instruction_tokens == CONTEXT


def test_open_clip_folders_that_lack_something_are_refused(tmp_path):
    source = open_clip_folder(tmp_path, siglip_tokenizer())
    OpenClipTextTower(source, -2)
    (tmp_path / "open_clip_model.safetensors").rename(tmp_path / "elsewhere")
    with pytest.raises(EncoderError, match="local-dir"):
        OpenClipTextTower(source, -2)
    (tmp_path / "elsewhere").rename(tmp_path / "open_clip_model.safetensors")
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(EncoderError, match="local-dir"):
        OpenClipTextTower(source, -2)


def test_open_clip_text_towers_of_another_kind_are_refused(tmp_path):
    bert = tmp_path / "bert"
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=100, **sizes)).save_pretrained(bert)
    source = open_clip_folder(tmp_path, siglip_tokenizer(), hf_model_name=str(bert), hf_model_pretrained=False)
    with pytest.raises(EncoderError, match="HFTextEncoder"):
        OpenClipTextTower(source, -2)


@pytest.mark.parametrize(
    "spec",
    [
        "nobody/nothing",
        "/no/such/folder",
        "open_clip:no-such-model:x",
        "open_clip:ViT-S-32-alt",
        "open_clip:ViT-S-32-alt:/no/file.pt",
    ],
)
def test_towers_that_cannot_be_loaded_say_why(spec):
    model = tiny.llava()
    with pytest.raises(EncoderError, match=spec.removeprefix("open_clip:")):
        patch_model(model, instruction_encoder=spec)
    patch_model(model)


def test_layers_that_do_not_exist_are_an_error(clip_folder, open_clip_weights):
    for spec in (str(clip_folder), open_clip_weights):
        with pytest.raises(EncoderError, match="instruction_layer"):
            patch_model(tiny.llava(), EmmaConfig(instruction_layer=40), instruction_encoder=spec)


def test_the_paper_set_up_reads_all_positions(clip_folder):
    model = tiny.llava()
    adapter = patch_model(model, EmmaConfig.paper(str(clip_folder)), processor=tiny.processor())
    assert adapter.config.max_instruction_tokens == 16
    seen = []
    adapter.alignment.fusion.register_forward_pre_hook(lambda module, args: seen.append(args))
    model(**tiny.chat_inputs([[tiny.user("why?")]]))
    [(_, tokens, mask, _)] = seen
    assert tokens.shape[1] == 16
    assert mask is None


class Counting(nn.Module):
    instruction_dim, max_instruction_tokens = 4, 6

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.calls: list[list[str]] = []

    def forward(self, texts):
        self.calls.append(texts)
        assert not torch.is_grad_enabled()
        tokens = torch.stack([torch.full((6, 4), float(len(text))) for text in texts]) * self.weight
        return tokens, torch.ones(len(texts), 6)


def test_encodings_are_cached_by_content_within_the_bound():
    model, encoder = tiny.llava(), Counting()
    adapter = patch_model(model, EmmaConfig(cache_size=2), processor=tiny.processor(), instruction_encoder=encoder)
    inputs = tiny.chat_inputs([[tiny.user("one")], [tiny.user("one")], [tiny.user("three")]])
    model(**inputs)
    assert encoder.calls == [["one", "three"]]
    model.generate(**inputs, max_new_tokens=2)
    assert encoder.calls == [["one", "three"]]
    info = adapter.cache_info()
    assert (info.hits, info.misses, info.currsize, info.maxsize) == (4, 2, 2, 2)
    assert "cache_hits=4, cache_misses=2" in repr(adapter)
    model(**inputs, instruction=["a", "b", "c"])
    assert adapter.cache_info().currsize == 2
    adapter.clear_cache()
    model(**inputs)
    assert encoder.calls[-1] == ["one", "three"]


def test_encoders_are_frozen_outside_of_the_model_and_not_saved(tmp_path):
    model, encoder = tiny.llava(), Counting().train()
    adapter = patch_model(model, processor=tiny.processor(), instruction_encoder=encoder)
    assert not encoder.training
    assert not encoder.weight.requires_grad
    assert all(parameter is not encoder.weight for parameter in model.parameters())
    adapter.save_pretrained(tmp_path)
    assert adapter.config.instruction_encoder.startswith("custom:")
    with pytest.raises(EncoderError, match="instruction_encoder="):
        load_adapter(tiny.llava(), tmp_path, processor=tiny.processor())
    load_adapter(tiny.llava(), tmp_path, instruction_encoder=Counting(), processor=tiny.processor())


def test_answers_from_inference_mode_can_be_trained_with():
    model = tiny.llava()
    adapter = patch_model(model, processor=tiny.processor(), instruction_encoder=Counting()).train_only()
    inputs = tiny.chat_inputs([[tiny.user("is there a cat?"), tiny.assistant("no")]], generate=False)
    with torch.inference_mode():
        model(**inputs)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -1] = inputs["input_ids"][:, -1]
    model(**inputs, labels=labels).loss.backward()
    assert adapter.cache_info().hits == 1
    assert adapter.alignment.fusion.cross_attention.output.weight.grad.abs().max() > 0


def test_cached_encodings_do_not_depend_on_the_callers_autocast(clip_folder):
    answers = []
    for first_in_autocast in (True, False):
        encoder = CachedEncoder(TransformersTextTower(str(clip_folder), -2), 8)
        with torch.autocast("cpu", torch.bfloat16, enabled=first_in_autocast):
            encoder.encode(TEXTS, CPU)
        answers.append(encoder.encode(TEXTS, CPU)[0])
    assert torch.equal(*answers)


def test_texts_of_different_lengths_are_padded_and_masked():
    class Ragged(Counting):
        def forward(self, texts):
            n = max(map(len, texts))
            return torch.ones(len(texts), n, 4), torch.tensor([[i < len(t) for i in range(n)] for t in texts])

    encoder = CachedEncoder(Ragged(), 8)
    encoder.encode(["abcd"], CPU)
    tokens, mask = encoder.encode(["ab", "abcd"], CPU)
    assert tokens.shape == (2, 4, 4)
    assert mask.tolist() == [[True, True, False, False], [True] * 4]


def broken(returned):
    class Broken(Counting):
        def forward(self, texts):
            return returned

    return Broken()


@pytest.mark.parametrize(
    "returned",
    [
        torch.ones(1, 2, 4),
        (torch.ones(1, 2, 4),),
        (torch.ones(2, 2, 4), torch.ones(2, 2)),
        (torch.ones(1, 2, 5), torch.ones(1, 2)),
        (torch.ones(1, 2, 4), torch.ones(1, 3)),
        (torch.ones(1, 7, 4), torch.ones(1, 7)),
    ],
)
def test_encoders_that_break_the_protocol_are_told_so(returned):
    model = tiny.llava()
    patch_model(model, processor=tiny.processor(), instruction_encoder=broken(returned))
    with pytest.raises(EncoderError, match="Broken"):
        model(**tiny.chat_inputs([[tiny.user("why?")]]))


def test_modules_without_the_protocol_are_refused():
    model = tiny.llava()
    with pytest.raises(EncoderError, match="instruction_dim"):
        patch_model(model, instruction_encoder=nn.Linear(2, 2))
    with pytest.raises(EncoderError, match=r"nn\.Module"):
        patch_model(model, instruction_encoder=lambda texts: None)
    assert isinstance(Counting(), InstructionEncoder)


def test_copies_of_a_model_share_the_frozen_encoder():
    model = tiny.llava()
    patch_model(model, processor=tiny.processor(), instruction_encoder=Counting())
    twin = copy.deepcopy(model)
    assert twin._emma.pipeline.encoder.module is model._emma.pipeline.encoder.module
