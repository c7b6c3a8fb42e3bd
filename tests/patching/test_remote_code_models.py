"""The stand-ins for models whose code is not in transformers behave as the originals do."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from tests.support import remote_internvl as internvl
from tests.support import remote_llava as llava

TILES = [[2, 1], [], [1]]
IMAGES = [2, 0, 1]
# Of LLaVA-NeXT every row needs a modality, or it gets lost.
EXTRAS: dict[str, dict[str, Any]] = {"llama": {}, "qwen": {"modalities": ["image"] * 8}}
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
# 5.24 passes every model its cache as ``cache``, which LLaVA's forward doesn't take unless the model is patched.
generates_by_itself = pytest.mark.skipif(
    "cache" in inspect.signature(transformers.LlamaForCausalLM.forward).parameters,
    reason="LLaVA's own classes can't generate with this transformers; patched they do: test_original_classes.py",
)


def calls_of(module: nn.Module) -> list[tuple[int, ...]]:
    """The shapes that a module gets from here on, call by call."""
    shapes: list[tuple[int, ...]] = []
    module.register_forward_pre_hook(lambda _, arguments: shapes.append(tuple(arguments[0].shape)))
    return shapes


@pytest.fixture
def chat_model() -> internvl.InternVLChatModel:
    return internvl.internvl_chat()


class TestInternVL:
    @pytest.mark.parametrize("padding_side", ["left", "right"])
    @pytest.mark.parametrize("row", range(len(TILES)))
    def test_a_row_alone_equals_the_row_in_a_batch(self, chat_model, row, padding_side):
        inputs = internvl.internvl_inputs(TILES, padding_side=padding_side)
        batch = chat_model(**inputs).logits[row, inputs["attention_mask"][row].bool()]
        torch.testing.assert_close(chat_model(**internvl.internvl_row(inputs, TILES, row)).logits[0], batch, **CLOSE)

    def test_tiles_depend_on_seed_row_and_position_only(self):
        first = internvl.internvl_inputs(TILES)["pixel_values"]
        assert torch.equal(internvl.internvl_inputs([[3], [], [1, 1]])["pixel_values"][:5], first)
        assert not torch.equal(internvl.internvl_inputs(TILES, seed=1)["pixel_values"], first)

    def test_the_projector_sees_dummy_tiles_and_the_language_model_does_not(self, chat_model):
        inputs = internvl.internvl_inputs(TILES)
        assert inputs["image_flags"].tolist() == [1, 1, 1, 0, 1]
        seen = calls_of(chat_model.mlp1)
        before = chat_model(**inputs).logits
        inputs["pixel_values"][3] = 5.0
        assert torch.equal(chat_model(**inputs).logits, before)
        assert seen == [(5, internvl.TOKENS_PER_TILE, 4 * internvl.WIDTH)] * 2

    @pytest.mark.parametrize(("tile", "row"), [(0, 0), (2, 0), (4, 2)])
    def test_a_tile_matters_to_its_own_row_only(self, chat_model, tile, row):
        inputs = internvl.internvl_inputs(TILES)
        before = chat_model(**inputs).logits
        inputs["pixel_values"][tile] *= -1
        change = (chat_model(**inputs).logits - before).abs().amax((1, 2))
        assert change[row] > 0.1
        assert change.sum() == change[row]

    def test_flags_may_have_a_second_dimension(self, chat_model):
        inputs = internvl.internvl_inputs(TILES)
        expected = chat_model(**inputs).logits
        assert torch.equal(chat_model(**{**inputs, "image_flags": inputs["image_flags"][:, None]}).logits, expected)

    def test_a_mismatch_is_cut_to_size_and_trains_nothing(self, chat_model):
        inputs = internvl.internvl_inputs(TILES)
        labels = inputs["input_ids"]
        assert chat_model(**inputs, labels=labels).loss > 0
        assert chat_model(**{**inputs, "image_flags": torch.ones(5)}, labels=labels).loss == 0

    def test_generation_follows_forward(self, chat_model):
        inputs = internvl.internvl_row(internvl.internvl_inputs(TILES), TILES, 0)
        made = chat_model.generate(**internvl.internvl_generate_inputs(inputs), max_new_tokens=3, do_sample=False)
        ids = inputs["input_ids"]
        for _ in range(3):
            logits = chat_model(inputs["pixel_values"], ids, image_flags=inputs["image_flags"]).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        assert torch.equal(made, ids[:, -3:])

    def test_generation_encodes_once_and_without_forward(self, chat_model):
        inputs = internvl.internvl_generate_inputs(internvl.internvl_inputs(TILES))
        projector, steps = calls_of(chat_model.mlp1), []
        chat_model.register_forward_pre_hook(lambda *_: pytest.fail("generate doesn't call the outer forward"))
        chat_model.language_model.register_forward_pre_hook(lambda *_: steps.append(1))
        made = chat_model.generate(**inputs, max_new_tokens=3, num_beams=2, num_return_sequences=2)
        assert projector == [(4, internvl.TOKENS_PER_TILE, 4 * internvl.WIDTH)]
        assert len(steps) == 3 and made.shape == (6, 3)

    def test_ready_features_replace_the_projector(self, chat_model):
        inputs = internvl.internvl_generate_inputs(internvl.internvl_inputs(TILES))
        settings = {"max_new_tokens": 3, "do_sample": False}
        expected = chat_model.generate(**inputs, **settings)
        features = chat_model.extract_feature(inputs["pixel_values"])
        seen = calls_of(chat_model.mlp1)
        assert torch.equal(chat_model.generate(**inputs, visual_features=features, **settings), expected)
        assert not seen
        text = {name: value for name, value in inputs.items() if name != "pixel_values"}
        without = chat_model.generate(**text, **settings)
        assert torch.equal(chat_model.generate(**text, visual_features=features, **settings), without)

    def test_generation_needs_the_placeholder_id(self):
        model = internvl.internvl_chat(set_context_token=False)
        with pytest.raises(AssertionError):
            model.generate(**internvl.internvl_generate_inputs(internvl.internvl_inputs(TILES)))

    def test_chat(self):
        model, words = internvl.internvl_chat(set_context_token=False), internvl.internvl_tokenizer()
        pixels, settings = internvl.internvl_inputs([[2, 1]])["pixel_values"], {"max_new_tokens": 3, "do_sample": False}
        seen = calls_of(model.mlp1)
        answer, history = model.chat(words, pixels[:2], "how many dogs?", settings, return_history=True)
        assert model.img_context_token_id == internvl.IMG_CONTEXT
        assert history == [("<image>\nhow many dogs?", answer)]
        model.chat(words, pixels, "and in <image>?", settings, history=history, num_patches_list=[2, 1])
        assert [shape[0] for shape in seen] == [2, 3]
        assert model.chat(words, None, "how many dogs?", settings) and len(seen) == 2

    def test_batch_chat_answers_as_chat(self, chat_model):
        words = internvl.internvl_tokenizer()
        pixels, settings = internvl.internvl_inputs([[2, 1]])["pixel_values"], {"max_new_tokens": 3, "do_sample": False}
        questions = ["how many dogs are there?", "a cat?"]
        answers = chat_model.batch_chat(words, pixels, questions, settings, num_patches_list=[2, 1])
        alone = zip(questions, pixels.split([2, 1]), strict=True)
        assert answers == [chat_model.chat(words, tiles, question, settings) for question, tiles in alone]

    def test_pixel_shuffle_folds_squares_of_four_patches(self, chat_model):
        grid = torch.arange(16.0).view(1, 4, 4, 1)
        assert chat_model.pixel_shuffle(grid)[0, 0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]
        chat_model.ps_version = "v1"
        assert chat_model.pixel_shuffle(grid)[0, 0].tolist() == [[0, 1, 4, 5], [8, 9, 12, 13]]

    def test_saved_and_loaded(self, chat_model, tmp_path):
        inputs = internvl.internvl_inputs(TILES)
        chat_model.save_pretrained(tmp_path)
        loaded = internvl.InternVLChatModel.from_pretrained(tmp_path).eval()
        loaded.img_context_token_id = internvl.IMG_CONTEXT
        assert torch.equal(loaded(**inputs).logits, chat_model(**inputs).logits)


def valid_length(inputs: dict[str, Any], tokens: list[list[int]], row: int) -> int:
    """How long a row is once its placeholders have become this many tokens each."""
    ids = inputs["input_ids"][row, inputs["attention_mask"][row].bool()]
    return len(ids) - int((ids == llava.IMAGE_TOKEN_INDEX).sum()) + sum(tokens[row])


LLAVA_FORMS = [
    ("batch", "flat", [[4, 4], [], [4]]),
    ("list", "flat", [[4, 4], [], [4]]),
    ("list", "spatial_unpad", [[5, 5], [], [5]]),
    ("stacked", "flat", [[12, 12], [], [12]]),
    ("anyres", "flat", [[12, 12], [], [20]]),
    ("anyres", "spatial", [[12, 12], [], [20]]),
    # The base tile, then lines that end with a newline: 2 of 4 + 1, 4 of 2 + 1, and 4 of 4 + 1 without two of bars.
    ("anyres", "spatial_unpad", [[4 + 10, 4 + 12], [], [4 + 10]]),
]


class TestLlava:
    @pytest.mark.parametrize("llm", ["llama", "qwen"])
    @pytest.mark.parametrize("padding_side", ["left", "right"])
    @pytest.mark.parametrize(("form", "patch_merge", "tokens"), LLAVA_FORMS)
    def test_a_row_alone_equals_the_row_in_a_batch(self, form, patch_merge, tokens, padding_side, llm):
        model = llava.llava_original(patch_merge=patch_merge, padding_side=padding_side, llm=llm)
        inputs = llava.llava_inputs(IMAGES, form=form)
        batch = model(**inputs, **EXTRAS[llm]).logits
        lengths = [valid_length(inputs, tokens, row) for row in range(len(IMAGES))]
        assert batch.shape[1] == max(lengths)
        for row, length in enumerate(lengths):
            alone = model(**llava.llava_row(inputs, IMAGES, row), **EXTRAS[llm]).logits[0]
            shown = batch[row, -length:] if padding_side == "left" else batch[row, :length]
            torch.testing.assert_close(alone, shown, **CLOSE)

    @pytest.mark.parametrize("form", ["batch", "list", "anyres"])
    def test_an_image_matters_to_its_own_row_only(self, form):
        model, inputs = llava.llava_original(), llava.llava_inputs(IMAGES, form=form)
        before = model(**inputs).logits
        for image, row in enumerate([0, 0, None, 2]):
            original = inputs["images"][image].clone()
            inputs["images"][image][:] = 1 - original
            change = (model(**inputs).logits - before).abs().amax((1, 2))
            inputs["images"][image][:] = original
            # The third image is the blank one of the row that shows none.
            assert change.sum() == (0 if row is None else change[row])
            assert row is None or change[row] > 0.1

    def test_a_row_without_images_uses_one_up(self):
        model, inputs = llava.llava_original(), llava.llava_inputs(IMAGES)
        shifted = {**inputs, "images": inputs["images"][[0, 1, 3]]}
        with pytest.raises(IndexError):
            model(**shifted)
        left_over = {**inputs, "images": torch.cat([inputs["images"], inputs["images"]])}
        torch.testing.assert_close(model(**left_over).logits, model(**inputs).logits)

    def test_placeholders_under_the_mask_do_not_count(self):
        model, inputs = llava.llava_original(), llava.llava_inputs([1, 2])
        expected = model(**inputs).logits
        assert inputs["attention_mask"][0, -1] == 0
        inputs["input_ids"][0, -1] = llava.IMAGE_TOKEN_INDEX
        assert torch.equal(model(**inputs).logits, expected)

    @pytest.mark.parametrize(
        ("form", "entries"), [("batch", 4), ("list", 4), ("stacked", 12), ("anyres", 3 + 3 + 3 + 5)]
    )
    def test_the_projector_is_called_once_with_all_tiles(self, form, entries):
        model = llava.llava_original(patch_merge="spatial_unpad")
        seen = calls_of(model.get_model().mm_projector)
        model(**llava.llava_inputs(IMAGES, form=form))
        assert seen == [(entries, 4, llava.WIDTH)]

    @pytest.mark.parametrize(
        ("projector", "kind"), [("linear", nn.Linear), ("mlp2x_gelu", nn.Sequential), ("identity", llava.IdentityMap)]
    )
    def test_projectors(self, projector, kind):
        model = llava.llava_original(projector)
        assert isinstance(model.get_model().mm_projector, kind)
        assert model(**llava.llava_inputs(IMAGES)).logits.isfinite().all()

    def test_labels_are_expanded_with_the_images(self):
        model, inputs = llava.llava_original(), llava.llava_inputs(IMAGES)
        labels = inputs["input_ids"].masked_fill(inputs["input_ids"] < 30, llava.IGNORE_INDEX)
        _, positions, mask, _, embeds, merged = model.prepare_inputs_labels_for_multimodal(
            inputs["input_ids"], None, inputs["attention_mask"], None, labels, inputs["images"]
        )
        assert positions is None and mask.shape == merged.shape == embeds.shape[:2]
        assert merged[merged != llava.IGNORE_INDEX].tolist() == labels[labels != llava.IGNORE_INDEX].tolist()
        assert model(**inputs, labels=labels).loss > 0

    def test_merged_rows_are_cut_to_the_longest_allowed(self):
        model = llava.llava_original(tokenizer_model_max_length=6)
        assert model(**llava.llava_inputs(IMAGES)).logits.shape[1] == 6

    @generates_by_itself
    @pytest.mark.parametrize("llm", ["llama", "qwen"])
    def test_generation_follows_forward(self, llm):
        model = llava.llava_original(llm=llm)
        inputs = llava.llava_inputs([2], form="anyres")
        made = model.generate(**llava.llava_generate_inputs(inputs), max_new_tokens=3, do_sample=False)
        ids: Tensor = inputs["input_ids"]
        for _ in range(3):
            visual = {name: inputs[name] for name in ("images", "image_sizes")}
            ids = torch.cat([ids, model(ids, **visual).logits[:, -1:].argmax(-1)], dim=1)
        assert torch.equal(made, ids[:, -3:])

    @generates_by_itself
    def test_generation_encodes_once(self, monkeypatch):
        model = llava.llava_original(padding_side="left")
        prepare, given = model.prepare_inputs_labels_for_multimodal, []

        def note(*arguments, **named):
            given.append(arguments[5] is not None)
            return prepare(*arguments, **named)

        monkeypatch.setattr(model, "prepare_inputs_labels_for_multimodal", note)
        seen, inputs = calls_of(model.get_model().mm_projector), llava.llava_inputs(IMAGES)
        made = model.generate(**llava.llava_generate_inputs(inputs), max_new_tokens=3, num_beams=2)
        assert seen == [(4, 4, llava.WIDTH)] and made.shape == (3, 3)
        # Once with the images, before the language model's generate; then without, once for each decoded token.
        assert given == [True, False, False]

    @generates_by_itself
    def test_generation_from_text_alone(self):
        model = llava.llava_original()
        seen = calls_of(model.get_model().mm_projector)
        made = model.generate(torch.tensor([[1, 10, 30]]), max_new_tokens=2, do_sample=False)
        assert made.shape == (1, 2) and not seen

    def test_next_drops_rows_without_a_modality(self):
        model, inputs = llava.llava_original(llm="qwen"), llava.llava_inputs(IMAGES)
        assert len(model(**inputs).logits) == 1
        assert len(model(**inputs, modalities=["image"] * 3).logits) == 3

    def test_next_shows_the_last_image_again_where_images_run_out(self):
        model, inputs = llava.llava_original(llm="qwen"), llava.llava_inputs([2])
        inputs["images"] = inputs["images"][:1]
        twice = {**inputs, "images": inputs["images"].repeat(2, 1, 1, 1)}
        torch.testing.assert_close(model(**inputs).logits, model(**twice).logits, **CLOSE)

    def test_next_pools_videos_after_the_projector(self):
        model, inputs = llava.llava_original(llm="qwen"), llava.llava_inputs([1], form="stacked")
        seen = calls_of(model.get_model().mm_projector)
        logits = model(**inputs, modalities=["video"]).logits
        assert seen == [(3, 4, llava.WIDTH)]
        assert logits.shape[1] == inputs["input_ids"].shape[1] - 1 + 3

    @pytest.mark.parametrize("llm", ["llama", "qwen"])
    def test_saved_and_loaded(self, llm, tmp_path):
        model = llava.llava_original(llm=llm, patch_merge="spatial_unpad")
        inputs = llava.llava_inputs(IMAGES, form="anyres")
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path).eval()
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
