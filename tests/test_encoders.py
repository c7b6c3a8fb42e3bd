from __future__ import annotations

import copy

import open_clip
import pytest
import torch
from torch import nn
from transformers import AutoTokenizer, CLIPTextModel

import tiny
from emma_adapter import EmmaConfig, EncoderError, InstructionEncoder, load_adapter, patch_model
from emma_adapter.instructions.encoders import CachedEncoder, OpenClipTextTower, TransformersTextTower

TEXTS = ["is there a cat?", "how many dogs are there, and what colour is the left one?", ""]
CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def open_clip_weights(tmp_path_factory):
    """A small open_clip model that people really use, with random weights in a local file."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("open-clip") / "weights.pt"
    torch.save(open_clip.create_model("ViT-S-32-alt").state_dict(), path)
    return f"open_clip:ViT-S-32-alt:{path}"


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
